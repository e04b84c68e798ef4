"""The names outside programs rely on, as the design wrote them down: they may be added to, never changed."""

import inspect

import hf_sparse
from hf_sparse.patterns import Pattern

ATTENTION = {
    "is_causal": False,
    "key_padding_mask": None,
    "global_mask": None,
    "scale": None,
    "dropout": 0.0,
    "layer": 0,
    "state": None,
    "hidden_states": None,
    "document_ids": None,
    "query_positions": None,
    "key_positions": None,
    "bias": None,
    "softcap": None,
    "sinks": None,
    "head_offset": 0,
    "backend": "auto",
    "return_lse": False,
}


def test_sparse_attention_takes_what_the_contract_says() -> None:
    parameters = inspect.signature(hf_sparse.sparse_attention).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert positional == ["query", "key", "value", "pattern"]
    assert {name: keywords[name] for name in ATTENTION} == ATTENTION
    assert all(keywords[name] is not inspect.Parameter.empty for name in keywords)


def test_every_public_name_is_there() -> None:
    assert [name for name in hf_sparse.__all__ if getattr(hf_sparse, name, None) is None] == []


def test_drawing_and_density_take_what_the_contract_says() -> None:
    for method in (Pattern.mask, Pattern.density):
        parameters = inspect.signature(method).parameters
        assert list(parameters)[:2] == ["self", "n"]
        keywords = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        assert {"heads": 1, "layer": 0, "is_causal": False}.items() <= keywords.items()


def test_fields_have_the_names_and_places_of_their_papers() -> None:
    fields = {
        "band": ["radius"],
        "dilated": ["radius", "dilation"],
        "strided": ["stride"],
        "block_local": ["block_size"],
        "global": ["positions"],
        "random": ["block_size", "num_random_blocks", "seed"],
        "longformer": ["window", "global_tokens", "dilation", "global_projections"],
        "bigbird": ["block_size", "num_random_blocks", "seed", "random_plan", "length"],
    }
    for key, wanted in fields.items():
        names = list(inspect.signature(hf_sparse.PATTERNS[key]).parameters)
        assert set(wanted) <= set(names), key
