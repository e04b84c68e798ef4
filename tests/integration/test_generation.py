"""Decoders: sparse causal attention against dense attention under the same mask, and generation with a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_sparse
from hf_sparse.patterns import Pattern
from tests.support import rules
from tests.support.decoders import allowed_pairs, positions_of, tiny_decoder, tiny_prompts
from tests.support.rounding import assert_within_rounding

DECODERS = ("GPT2", "GPTNeoX", "Llama", "Mistral", "OPT", "Qwen2", "Qwen3")
SINKS = hf_sparse.pattern("longformer", window=6, global_tokens=(0,), global_projections=False)
PATTERNS: list[tuple[Pattern, rules.Rule]] = [
    (hf_sparse.pattern("band", radius=4), rules.band(4)),
    (SINKS, rules.longformer(6, (0,))),
    (
        hf_sparse.pattern("band", radius=1) | hf_sparse.pattern("strided", stride=5),
        rules.union(rules.band(1), rules.strided(5)),
    ),
]
NEW = 12


def logits(model: PreTrainedModel, batch: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


def generate(model: PreTrainedModel, batch: dict[str, Tensor], **settings: Any) -> Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 1, **settings}
    return model.generate(**batch, **settings)


def assert_equal_to_rounding(one: Tensor, other: Tensor) -> None:
    """Allow what two orders of float32 sums over 32 wide states may differ by."""
    assert (one - other).abs().max() <= 64 * torch.finfo(torch.float32).eps * other.abs().max()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(("pattern", "rule"), PATTERNS, ids=lambda value: getattr(value, "key", ""))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sparse_decoder_equals_dense_attention_under_its_mask(
    family: str, pattern: Pattern, rule: rules.Rule, side: str
) -> None:
    batch = tiny_prompts(33, side=side)
    positions = positions_of(batch["attention_mask"])
    dense = tiny_decoder(family)
    held = {"input_ids": batch["input_ids"], "position_ids": positions}
    held["attention_mask"] = allowed_pairs(batch["attention_mask"], rule)
    plain, oracle = logits(dense, held), logits(dense.double(), held)
    sparse = hf_sparse.sparsify_(tiny_decoder(family), pattern)
    got = logits(sparse, batch, position_ids=positions)
    real = batch["attention_mask"] != 0
    assert_within_rounding(got[real], oracle[real], plain[real])
    # and the mask is not the whole triangle
    assert (got - logits(tiny_decoder(family), batch, position_ids=positions))[real].abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "pattern"),
    [*(("GPT2", pattern) for pattern, _ in PATTERNS), *((family, SINKS) for family in DECODERS[1:])],
    ids=lambda value: getattr(value, "key", value),
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 6])
def test_generation_with_a_cache_equals_recomputing_every_token(
    family: str, pattern: Pattern, cache: str, padding: int
) -> None:
    model = hf_sparse.sparsify_(tiny_decoder(family), pattern)
    batch = tiny_prompts(padding=padding)
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    got = generate(model, batch, output_logits=True, return_dict_in_generate=True, **settings)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for step in range(NEW):
        said = logits(
            model, {"input_ids": ids, "attention_mask": mask}, position_ids=positions_of(mask), use_cache=False
        )
        assert_equal_to_rounding(got.logits[step], said[:, -1])
        ids = torch.cat([ids, said[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    assert torch.equal(got.sequences, ids)


@pytest.mark.parametrize("family", DECODERS)
def test_a_padded_row_generates_what_it_generates_alone(family: str) -> None:
    model = hf_sparse.sparsify_(tiny_decoder(family), SINKS)
    batch = tiny_prompts(padding=6)
    together = generate(model, batch)[1, 6:]
    alone = generate(model, {name: value[1:, 6:] for name, value in batch.items()})[0]
    assert torch.equal(together, alone)


@pytest.mark.parametrize("family", DECODERS)
def test_a_layer_declared_dense_stays_dense_in_generation(family: str) -> None:
    batch = tiny_prompts()
    held = hf_sparse.sparsify_(tiny_decoder(family), SINKS, layers={0: "dense", 1: "dense"})
    for settings in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(held, batch, **settings), generate(tiny_decoder(family), batch))


def test_beams_and_marked_tokens_are_served_with_a_cache() -> None:
    marked = hf_sparse.pattern("longformer", window=6, global_projections=False)
    model, batch = hf_sparse.sparsify_(tiny_decoder("GPT2"), marked), tiny_prompts(padding=0)
    is_global = torch.zeros_like(batch["input_ids"])
    is_global[:, 0] = 1
    named = hf_sparse.sparsify_(tiny_decoder("GPT2"), SINKS)
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        want = generate(named, batch, **settings)
        assert torch.equal(generate(model, batch, global_attention_mask=is_global, **settings), want)
    assert not torch.equal(generate(model, batch), want)


def test_what_cannot_decode_with_a_cache_is_refused_by_name() -> None:
    batch = tiny_prompts()
    model = hf_sparse.sparsify_(tiny_decoder("GPT2"), hf_sparse.pattern("reformer", chunk_length=4))
    with pytest.raises(
        ValueError, match=r"'reformer' is content-based and does not serve cached decoding.*use_cache=False"
    ):
        generate(model, batch)
    assert generate(model, batch, use_cache=False).shape == (2, 21 + NEW)


def test_fused_projections_refuse_patterns_that_copy_them() -> None:
    with pytest.raises(
        hf_sparse.UnsupportedModelError, match=r"GPT2Attention has no separate.*global_projections=False"
    ):
        hf_sparse.sparsify_(tiny_decoder("GPT2"), hf_sparse.pattern("longformer"))


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_documents_of_a_packed_row_do_not_read_each_other_in_dense_layers_either(family: str) -> None:
    ids = tiny_prompts(30, padding=0)["input_ids"][:1]
    documents = torch.cat([torch.full((length,), at) for at, length in enumerate((11, 19))])[None]
    positions = torch.cat([torch.arange(11), torch.arange(19)])[None]
    model = hf_sparse.sparsify_(tiny_decoder(family), hf_sparse.pattern("band", radius=4), layers={0: "dense"})
    alone = torch.cat([logits(model, {"input_ids": part}) for part in ids.split((11, 19), 1)], 1)
    # told, and read from the restarts of the positions, whether the pass makes a cache or not
    for told in ({"document_ids": documents}, {}):
        for use_cache in (True, False):
            batch = {"input_ids": ids, "position_ids": positions, **told}
            assert_equal_to_rounding(logits(model, batch, use_cache=use_cache), alone)


def test_a_static_cache_under_sdpa_shows_the_dense_model() -> None:
    model, batch = hf_sparse.sparsify_(tiny_decoder("Llama"), SINKS), tiny_prompts()
    sparse = generate(model, batch, cache_implementation="static")
    model.set_attn_implementation("sdpa")
    dense = generate(model, batch, cache_implementation="static")
    assert torch.equal(dense, generate(tiny_decoder("Llama"), batch))
    assert not torch.equal(dense, sparse)
