"""Sequences spread over two ranks by DeepSpeed's Ulysses layer say what they say whole; what cannot be spread is refused."""

import importlib.util
import json
import sys
from typing import Any

import pytest
import torch

import hf_sparse
from hf_sparse.recipes.sequence_parallel import check_can_spread, spread_sequences, stretch_of
from tests.ranks.spreading import CASES, RANKS, tiny_llama, whole_batch
from tests.support.models import tiny_model
from tests.support.ranks import run_on_two

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="Ulysses needs hf-sparse[deepspeed]"
)
REFUSED: dict[str, tuple[hf_sparse.Pattern, str]] = {
    "star": (hf_sparse.pattern("star"), "nodes that are no tokens"),
    "sinkhorn": (hf_sparse.pattern("sinkhorn", block_size=8), "drawn for all of them together"),
    "sac": (hf_sparse.pattern("sac"), "from more than queries and keys"),
    "longformer": (
        hf_sparse.pattern("longformer", window=8),
        "its GlobalProjections read hidden states, of which a rank has its own stretch alone",
    ),
    "union": (
        hf_sparse.pattern("band", radius=2) | hf_sparse.pattern("sinkhorn", block_size=8),
        "'sinkhorn': what its heads choose",
    ),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found."""
    path = tmp_path_factory.mktemp("ranks") / "said.json"
    run_on_two("tests.ranks.spreading", str(path), seconds=500)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.several_processes
@pytest.mark.parametrize("case", CASES)
def test_two_halves_give_the_output_and_the_gradients_of_the_whole(said: dict[str, Any], case: str) -> None:
    # all is float64, but for the loss, which Llama sums in float32
    limits = {what: 1e-6 if what == "loss" else 1e-14 for what in said["off"][case]}
    assert {what: value for what, value in said["off"][case].items() if value > limits[what]} == {}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.several_processes
@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("padding", "sequences are spread over ranks without padding"),
        ("global marks", "sequences are spread over ranks without global_attention_mask"),
        ("documents", "sequences are spread over ranks without document_ids"),
        ("packing", "sequences are spread whole, without padding or packing|without packed documents"),
        ("another stretch", "position_ids of rank 1 must count from 12 to 23 in every row, as stretch_of makes them"),
    ],
)
def test_a_call_that_cannot_be_spread_is_refused(said: dict[str, Any], call: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(said["refused"][call])


@pytest.mark.parametrize("name", REFUSED)
def test_a_pattern_that_needs_whole_layers_is_refused(name: str) -> None:
    pattern, message = REFUSED[name]
    # the model is there to be asked how large it is
    model = tiny_llama(4, 2, hf_sparse.pattern("band"))
    module = model.model.layers[1].self_attn
    module._sparse = type(module._sparse)(pattern, 1)
    with pytest.raises(ValueError, match=f"pattern {pattern.key!r} cannot be spread over ranks: .*{message}"):
        check_can_spread(model, 2)


def test_a_model_that_cannot_be_spread_is_refused() -> None:
    band = hf_sparse.pattern("band", radius=2)
    model = tiny_llama(4, 2, band)
    with pytest.raises(ValueError, match="4 heads over 2 of keys and values cannot be shared by 3 ranks"):
        check_can_spread(model, 3)
    with pytest.raises(ValueError, match="6 heads over 3 of keys and values cannot be shared by 2 ranks"):
        check_can_spread(tiny_llama(6, 3, band), 2)
    with pytest.raises(ValueError, match="ranks must be at least 2, got 1"):
        check_can_spread(model, 1)
    with pytest.raises(ValueError, match=r"SparseBertModel cannot be spread: .* whose config has num_key_value_heads"):
        check_can_spread(hf_sparse.sparsify_(tiny_model("Bert"), band), 2)
    with pytest.raises(ValueError, match=r"BertModel is dense; make it sparse by hf_sparse\.sparsify_"):
        check_can_spread(tiny_model("Bert"), 2)
    with pytest.raises(RuntimeError, match="there are no ranks: start with torchrun"), spread_sequences(model, ranks=2):
        pass


def test_without_deepspeed_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    model = tiny_llama(6, 6, hf_sparse.pattern("band", radius=2))
    with pytest.raises(ImportError, match=r"pip install 'hf-sparse\[deepspeed\]'"), spread_sequences(model, ranks=3):
        pass
    with pytest.raises(ValueError, match="ranks=2 must divide the 3 processes"), spread_sequences(model, ranks=2):
        pass


def test_stretches_put_together_are_the_batch() -> None:
    batch = whole_batch()
    parts = [stretch_of(batch, rank=rank, ranks=RANKS) for rank in range(RANKS)]
    whole = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    assert torch.equal(whole["input_ids"], batch["input_ids"])
    assert torch.equal(whole["labels"], batch["labels"])
    assert whole["position_ids"].tolist() == [list(range(24))] * 2
    assert torch.equal(whole["shift_labels"][:, :-1], batch["labels"][:, 1:])
    assert whole["shift_labels"][:, -1].tolist() == [-100, -100]


def test_a_batch_that_cannot_be_cut_is_refused() -> None:
    batch = whole_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="sequences are spread without padding: give each batch rows of one length"):
        stretch_of({**batch, "attention_mask": mask}, rank=0, ranks=2)
    with pytest.raises(ValueError, match="24 tokens cannot be shared by rank 1 of 5: cut or join them to a multiple"):
        stretch_of(batch, rank=1, ranks=5)
    with pytest.raises(ValueError, match="sequences are spread without 'global_attention_mask'"):
        stretch_of({**batch, "global_attention_mask": mask}, rank=0, ranks=2)
