"""The policy loss of SAC: REINFORCE by its definition, the same where activations are recomputed, and it teaches."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse
from hf_sparse.patterns.edge_predictor import EdgePredictor, Nodes, Record
from hf_sparse.recipes.policy import PolicyLoss
from tests.support.models import tiny_batch, tiny_model

N = 40
BAND = hf_sparse.pattern("band", radius=2)
BLOCKS = hf_sparse.pattern("sac", block_size=8, edges_per_token=16, radius=2)
TOKENS = hf_sparse.pattern("sac", granularity="token", edges_per_token=3, radius=0)
PATTERNS = {
    "block": BLOCKS,
    "token_united": TOKENS | BAND,
    "some_heads": hf_sparse.by_head({(0, 3): BLOCKS, range(1, 3): BAND}),
}
all_patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def sparse(pattern: hf_sparse.Pattern = BLOCKS, head: str = "ForMaskedLM") -> Any:
    return hf_sparse.sparsify_(tiny_model("Bert", head), pattern).train()


def states(model: nn.Module) -> list[EdgePredictor]:
    return [module for module in model.modules() if isinstance(module, EdgePredictor)]


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return loss


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@all_patterns
def test_the_loss_is_reinforce_on_the_mean_of_all_sources(pattern: hf_sparse.Pattern) -> None:
    model, batch = sparse(pattern), tiny_batch(N)
    policy = PolicyLoss(model)
    policy.baseline = 0.5
    torch.manual_seed(0)
    model(**batch)
    totals: list[list[Tensor]] = [[], []]
    for state in states(model):
        for record in state.records:
            logs = state.log_probabilities(record.nodes, record.picks, record.is_causal, record.heads)
            for row, own in zip(range(2)[record.rows], logs, strict=True):
                totals[row] += own.flatten().unbind()
    # two layers, their heads, and the nodes of 40 and 31 real tokens
    heads, size = (2 if pattern == PATTERNS["some_heads"] else 4), (1 if pattern == PATTERNS["token_united"] else 8)
    assert [len(own) for own in totals] == [2 * heads * -(-real // size) for real in (N, N - 9)]
    rewards = (2.0, -1.0)
    means = [torch.stack(own).mean() for own in totals]
    want = -sum((reward - 0.5) * own for reward, own in zip(rewards, means, strict=True)) / 2
    found = policy(torch.tensor(rewards))
    assert torch.allclose(found, want)
    wanted = torch.autograd.grad(want, [p for state in states(model) for p in state.parameters()], retain_graph=True)
    found.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "sparse_state" not in name)
    held = [p.grad for state in states(model) for p in state.parameters()]
    assert all(torch.allclose(one, other) for one, other in zip(held, wanted, strict=True) if one is not None)
    assert any(one.abs().max() > 1e-4 for one in wanted)


def test_a_number_rewards_every_row() -> None:
    model, batch = sparse(), tiny_batch(N)
    policy, other = PolicyLoss(model), PolicyLoss(copy.deepcopy(model))
    policy.baseline = other.baseline = 0.0
    model(**batch)
    for one, copied in zip(states(model), other._states, strict=True):
        copied.records = list(one.records)
    assert torch.equal(policy(3.0), other(torch.full((2,), 3.0)))


def test_the_expected_loss_has_the_gradient_of_the_expected_reward() -> None:
    """Over all picks of one source of three nodes, whatever the baseline is."""
    state = EdgePredictor(6, 1, 4).double()
    hidden = torch.randn(1, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = Nodes(hidden, hidden)
    policy, rewards = PolicyLoss(nn.ModuleList([state])), (1.0, -2.0, 0.5)
    # two of the three sources have no choice
    fixed = torch.tensor([[0], [-1], [-1]])
    total = expected = torch.zeros((), dtype=torch.float64)
    for node, reward in enumerate(rewards):
        picks = fixed.index_fill(0, torch.tensor(0), node)[None, None]
        likely = state.log_probabilities(nodes, picks, False).sum().exp()
        state.records = [Record(slice(0, 1), 1, slice(0, 1), nodes, picks, False)]
        policy.baseline = 0.3
        # of three sources
        total = total - 3 * likely.detach() * policy(reward)
        expected = expected + likely * reward
    found, wanted = (
        torch.autograd.grad(loss, list(state.parameters()), materialize_grads=True) for loss in (total, expected)
    )
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(found, wanted, strict=True))
    assert any(one.any() for one in wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
@all_patterns
def test_recomputed_activations_give_equal_gradients(pattern: hf_sparse.Pattern, use_reentrant: bool) -> None:
    plain, batch = sparse(pattern), tiny_batch(N)
    again = copy.deepcopy(plain)
    enable = getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    found = []
    for model in (plain, again):
        policy = PolicyLoss(model, decay=0.5)
        for _ in range(2):
            torch.manual_seed(0)
            model.zero_grad()
            loss = loss_of(model, batch)
            (loss + policy(torch.stack([-loss, loss]))).backward()
            # nothing was picked a second time
            assert not any(state.records for state in states(model))
        found.append((gradients(model), policy.baseline))
    assert found[0][1] == found[1][1]
    assert found[0][0].keys() == found[1][0].keys()
    for name, wanted in found[0][0].items():
        assert torch.equal(found[1][0][name], wanted), name
    assert any(grad.any() for name, grad in found[0][0].items() if "sparse_state" in name)


def test_what_is_kept_holds_no_graph_and_is_of_the_last_training_pass() -> None:
    model, batch = sparse(), tiny_batch(N)
    model(**batch)
    assert not any(state.records for state in states(model))
    policy = PolicyLoss(model)
    for _ in range(2):
        model(**batch)
    for state in states(model):
        # rows of two lengths
        assert [record.rows for record in state.records] == [slice(0, 1), slice(1, 2)]
        assert not any(r.nodes.asked.requires_grad or r.nodes.offered.requires_grad for r in state.records)
    policy(1.0)
    with pytest.raises(ValueError, match="no edges were picked since the last call"):
        policy(1.0)
    model(**batch)
    model.eval()(**batch)
    with pytest.raises(ValueError, match="call the model first, in training mode"):
        policy(1.0)


def test_the_baseline_is_the_moving_average_of_the_rewards() -> None:
    model, batch = sparse(), tiny_batch(N)
    policy = PolicyLoss(model, decay=0.75)
    model(**batch)
    # the first is its own
    assert policy(torch.tensor(4.0)).item() == 0
    assert policy.baseline == 4.0
    model(**batch)
    policy(torch.tensor([1.0, 3.0]))
    assert policy.baseline == 0.75 * 4.0 + 0.25 * 2.0


def test_weights_that_the_task_does_not_train_still_take_part() -> None:
    model = sparse()
    loss_of(model, tiny_batch(N)).backward()
    for state in states(model):
        assert all(p.grad is not None and not p.grad.any() for p in state.parameters())


def test_texts_so_short_that_all_is_picked_give_no_gradient() -> None:
    model = sparse()
    policy = PolicyLoss(model)
    model(**tiny_batch(12, padding=2))
    policy(1.0).backward()
    assert all(not p.grad.any() for state in states(model) for p in state.parameters() if p.grad is not None)


def test_under_autocast_the_loss_is_the_same() -> None:
    model, batch = sparse(), tiny_batch(N)
    policy = PolicyLoss(model)
    policy.baseline = 0.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
        held = [list(state.records) for state in states(model)]
        inside = policy(1.0)
    for state, records in zip(states(model), held, strict=True):
        state.records = records
    policy.baseline = 0.0
    assert torch.equal(policy(1.0), inside)


def test_picks_that_are_rewarded_become_likelier() -> None:
    torch.manual_seed(0)
    model, batch = sparse(head="Model"), tiny_batch(N)
    policy = PolicyLoss(model, decay=0.9)
    optimizer = torch.optim.Adam([p for state in states(model) for p in state.parameters()], lr=0.01)

    def reward() -> Tensor:
        """Return how often the first block is picked."""
        held = [record.picks == 0 for state in states(model) for record in state.records]
        return torch.cat([own.any(-1).flatten() for own in held]).float().mean()

    rewards = []
    for _ in range(60):
        with torch.no_grad():
            model(**batch)
        rewards.append(reward())
        optimizer.zero_grad()
        policy(rewards[-1]).backward()
        optimizer.step()
    first, last = (torch.stack(own).mean().item() for own in (rewards[:10], rewards[-10:]))
    assert last > first + 0.2


def test_what_it_cannot_work_with_is_said() -> None:
    with pytest.raises(ValueError, match="BertModel has no predictors of edges"):
        PolicyLoss(tiny_model("Bert"))
    model = sparse()
    for decay in (1.0, -0.1):
        with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
            PolicyLoss(model, decay=decay)
    policy = PolicyLoss(model)
    with pytest.raises(ValueError, match="call the model first, in training mode and on a batch with tokens"):
        policy(1.0)
    model(**tiny_batch(N))
    for count in (1, 3):
        with pytest.raises(ValueError, match=rf"a number or one for each of 2 rows, got shape \[{count}\]"):
            policy(torch.ones(count))
    with pytest.raises(ValueError, match="reward must be finite, got nan"):
        policy(float("nan"))
    # a call that was refused takes nothing off
    assert policy(1.0).isfinite()


def test_a_row_of_padding_at_the_end_has_its_reward_too() -> None:
    model, batch = sparse(), tiny_batch(N)
    batch["attention_mask"][1] = 0
    policy = PolicyLoss(model)
    model(**batch)
    assert policy(torch.tensor([1.0, 2.0])).isfinite()


def test_a_pass_through_the_base_model_begins_anew_as_well() -> None:
    model, batch = sparse(), tiny_batch(N)
    PolicyLoss(model)
    states = [module for module in model.modules() if isinstance(module, EdgePredictor)]
    assert states
    for _ in range(2):
        model.base_model(**batch)
        assert [len({record.rows.start for record in state.records}) for state in states] == [2] * len(states)
