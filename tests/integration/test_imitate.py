"""Imitation: predictors learn what dense attention attends to most, in the dense model's own hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

import hf_sparse
from hf_sparse.integration import imitate
from hf_sparse.patterns.edge_predictor import EdgePredictor, Record
from tests.support.models import tiny_batch, tiny_model

N, BLOCK, STEPS = 40, 8, 2
BLOCKS = hf_sparse.pattern("sac", block_size=BLOCK, edges_per_token=16, radius=3)
TOKENS = hf_sparse.pattern("sac", granularity="token", edges_per_token=2, radius=3)


def sparse(pattern: hf_sparse.Pattern = BLOCKS, family: str = "Bert", **fields: Any) -> Any:
    return hf_sparse.sparsify_(tiny_model(family, **fields), pattern).eval()


def states(model: nn.Module) -> list[EdgePredictor]:
    return [module for module in model.modules() if isinstance(module, EdgePredictor)]


def noted(model: Any, batches: list[dict[str, Tensor]]) -> list[list[list[Record]]]:
    return imitate._noted(model, states(model), batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", [BLOCKS, TOKENS], ids=["block", "token"])
def test_noted_is_what_the_dense_model_attends_to_most(pattern: Any, is_causal: bool, side: str) -> None:
    fields = {"is_decoder": True} if is_causal else {}
    batch, size = tiny_batch(N, side=side), (BLOCK if pattern is BLOCKS else 1)
    dense: Any = tiny_model("Bert", attn_implementation="eager", **fields)
    with torch.no_grad():
        want = dense(**batch, output_attentions=True, output_hidden_states=True)
    ((*layers,),) = noted(sparse(pattern, **fields), [batch])
    assert len(layers) == 2
    for layer, records in enumerate(layers):
        assert [record.rows for record in records] == [slice(0, 1), slice(1, 2)]
        for row, record in enumerate(records):
            at = (batch["attention_mask"][row] != 0).nonzero()[:, 0]
            hidden, mass = want.hidden_states[layer][row, at], want.attentions[layer][row][:, at][:, :, at].double()
            assert torch.allclose(record.nodes.offered[0, 0], hidden[:size].mean(0), atol=1e-5)
            assert record.is_causal == is_causal
            nodes = -(-len(at) // size)
            assert record.picks.shape == (1, 4, nodes, STEPS)
            for head in range(4):
                for source in range(nodes):
                    sums = [0.0] * nodes
                    for q in range(source * size, min(source * size + size, len(at))):
                        for k in range(len(at)):
                            if abs(q - k) > 3:
                                sums[k // size] += mass[head, q, k].item()
                    best = sorted(range(nodes), key=lambda node: -sums[node])[:STEPS]
                    wanted = [node if sums[node] > 0 else -1 for node in best]
                    assert record.picks[0, head, source].tolist() == wanted, (layer, row, head, source)


def test_imitation_changes_the_predictors_alone_and_leaves_the_model_as_it_was() -> None:
    model, batch = sparse(), tiny_batch(N)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    states(model)[0].enter.weight.requires_grad_(False)
    torch.manual_seed(0)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert hf_sparse.imitate_(model, iter([batch]), steps=3) is model
    assert torch.equal(torch.rand(1), drawn)
    assert [module.training for module in model.modules()] == modes
    assert not states(model)[0].enter.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("sparse_state" not in name), name
    assert not any(state.records or state.is_imitating for state in states(model))


@pytest.mark.parametrize("pattern", [
    BLOCKS,
    TOKENS | hf_sparse.pattern("global", positions=(0,)),
    hf_sparse.by_head({0: hf_sparse.pattern("band", radius=2), range(1, 4): BLOCKS}),
], ids=["block", "token_united", "some_heads"])  # fmt: skip
def test_the_picks_come_nearer_to_those_of_dense_attention(pattern: hf_sparse.Pattern) -> None:
    model, batches = sparse(pattern), [tiny_batch(N), tiny_batch(N, seed=1)]

    def losses() -> float:
        held = [zip(states(model), lines, strict=True) for lines in noted(model, batches)]
        return sum(imitate._loss(state, records).item() for lines in held for state, records in lines)

    before = losses()
    hf_sparse.imitate_(model, batches, steps=60, learning_rate=0.01)
    assert losses() < 0.8 * before


def test_what_was_learned_is_saved(tmp_path: Path) -> None:
    model, batch = sparse(), tiny_batch(N)
    with torch.no_grad():
        at_random = model(**batch)[0]
        hf_sparse.imitate_(model, [batch], steps=20, learning_rate=0.01)
        after = model(**batch)[0]
        model.save_pretrained(tmp_path)
        loaded: Any = AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(**batch)[0], after)
    assert not torch.allclose(after, at_random)
    for one, other in zip(states(model), states(loaded), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_model_of_half_precision_learns_by_steps_too_small_for_it() -> None:
    model, batch = sparse().to(torch.bfloat16), tiny_batch(N)
    (weight, *_) = (state.enter.weight for state in states(model))
    before = weight.clone()
    hf_sparse.imitate_(model, [batch], steps=40, learning_rate=1e-4)
    # numbers of bfloat16 beyond 0.25 are at least 2 ** -10 apart
    is_large = before.abs() > 0.25
    assert is_large.sum() > 20
    assert (weight != before)[is_large].float().mean() > 0.5
    assert all(p.dtype == torch.bfloat16 for state in states(model) for p in state.parameters())


def test_dropout_plays_no_part() -> None:
    model, batch = sparse(hidden_dropout_prob=0.5), tiny_batch(N)
    ((*wanted,),) = noted(model, [batch])
    ((*found,),) = noted(model.train(), [batch])
    for one, other in zip(found, wanted, strict=True):
        assert all(torch.equal(a.picks, b.picks) for a, b in zip(one, other, strict=True))


def test_what_it_cannot_work_with_is_said() -> None:
    batch = tiny_batch(N)
    with pytest.raises(ValueError, match="BertModel has no predictors of edges"):
        hf_sparse.imitate_(tiny_model("Bert"), [batch])
    with pytest.raises(ValueError, match="needs at least one batch"):
        hf_sparse.imitate_(sparse(), [])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        hf_sparse.imitate_(sparse(), [batch], steps=0)
    with pytest.raises(ValueError, match="learning_rate must be above 0 and finite, got 0"):
        hf_sparse.imitate_(sparse(), [batch], learning_rate=0)
    for rate in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="learning_rate must be above 0 and finite"):
            hf_sparse.imitate_(sparse(), [batch], learning_rate=rate)
    with pytest.raises(TypeError, match=r"steps must be a whole number, got 2\.5"):
        hf_sparse.imitate_(sparse(), [batch], steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a mapping such as a tokenizer returns, got Tensor"):
        hf_sparse.imitate_(sparse(), batch["input_ids"])  # type: ignore[arg-type]
    model = sparse()
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"imitation diverged and changed nothing; lower learning_rate=1e\+30"):
        hf_sparse.imitate_(model, [batch], steps=5, learning_rate=1e30)
    assert all(torch.equal(weight, kept[name]) for name, weight in model.state_dict().items())
    with pytest.raises(ValueError, match="so short that every node is picked"):
        hf_sparse.imitate_(sparse(), [tiny_batch(12, padding=2)])
