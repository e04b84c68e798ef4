"""SAC: what is picked, how likely, who reads whom by it, the gradient of its training, and bad fields."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.edge_predictor import BUCKETS, EdgePredictor, Nodes, buckets_of
from hf_sparse.patterns.sac import SAC
from tests.patterns.content_checks import HEADS, SCALE, check_against
from tests.support import sac_rules
from tests.support.content_rules import attend_counts, enumerate_choices
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import random_tensors

HIDDEN, BLOCK = 6, 4
LENGTHS = (1, 2, 5, 12, 22)
ALL = slice(None)
both_ways = pytest.mark.parametrize("is_causal", [False, True])
granularities = pytest.mark.parametrize("fields", [
    {"block_size": BLOCK, "edges_per_token": 7},
    {"granularity": "token", "edges_per_token": 3},
], ids=["block", "token"])  # fmt: skip


def made(**fields: Any) -> SAC:
    pattern = hf_sparse.pattern("sac", **{"radius": 1, "predictor_size": 5, **fields})
    assert isinstance(pattern, SAC)
    return pattern


def predictor(*, heads: int = HEADS, size: int = 5, seed: int = 0, spread: float = 0.8) -> EdgePredictor:
    """Return a predictor with random weights, distances included, in float64."""
    state = EdgePredictor(HIDDEN, heads, size).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in state.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return state


def hidden_of(n: int, rows: int = 2) -> Tensor:
    return torch.randn(rows, n, HIDDEN, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def wanted_picks(pattern: SAC, state: EdgePredictor, hidden: Tensor, head: int, is_causal: bool) -> list[list[int]]:
    """Return the oracle's greedy picks of every source of one row."""
    is_token = pattern.granularity == "token"
    size = 1 if is_token else pattern.block_size
    asked, offered = sac_rules.nodes_of(hidden, size, is_causal=is_causal, is_token=is_token)
    steps = min(-(-pattern.edges_per_token // size), len(offered))
    held = dict(state.state_dict()), asked, offered, head
    return [sac_rules.greedy(*held, source, steps, is_causal=is_causal) for source in range(len(offered))]


@both_ways
@granularities
@pytest.mark.parametrize("radius", [0, 3])
@pytest.mark.parametrize("n", LENGTHS)
def test_attention_equals_the_definition(n: int, radius: int, fields: dict[str, Any], is_causal: bool) -> None:
    pattern, state, hidden = made(**fields, radius=radius), predictor(), hidden_of(n)
    size = fields.get("block_size", 1)

    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        picks = wanted_picks(pattern, state, hidden[row], head, is_causal)
        table = sac_rules.edges(picks, n, size, radius, is_causal=is_causal)
        return attend_counts(query, key, value, table, SCALE, self_is_last_resort=False)

    check_against(pattern, oracle, n, is_causal=is_causal, state=state, hidden_states=hidden)


@both_ways
@granularities
def test_picks_and_their_likelihood_equal_the_definition(fields: dict[str, Any], is_causal: bool) -> None:
    pattern, state, hidden = made(**fields), predictor(), hidden_of(22)
    size, is_token = fields.get("block_size", 1), "granularity" in fields
    pairs = [sac_rules.nodes_of(row, size, is_causal=is_causal, is_token=is_token) for row in hidden]
    asked, offered = (torch.stack(list(held)) for held in zip(*pairs, strict=True))
    nodes = Nodes(asked, offered)
    settings: dict[str, Any] = {"heads": ALL, "is_causal": is_causal}
    steps = -(-pattern.edges_per_token // size)
    greedy = state.pick(nodes, steps, is_sampled=False, **settings)
    torch.manual_seed(0)
    sampled = state.pick(nodes, steps, is_sampled=True, **settings)
    assert not torch.equal(greedy, sampled)
    logs = state.log_probabilities(nodes, sampled, is_causal)
    gradients = torch.autograd.grad(logs.sum(), list(state.parameters()))
    weights = {name: held.detach().requires_grad_() for name, held in state.state_dict().items()}
    total = torch.zeros((), dtype=torch.float64)
    for row, head, source in itertools.product(range(2), range(HEADS), range(asked.shape[1])):
        held = weights, asked[row], offered[row], head, source
        want = sac_rules.greedy(*held, steps, is_causal=is_causal)
        assert greedy[row, head, source].tolist() == want + [-1] * (steps - len(want))
        drawn = [node for node in sampled[row, head, source].tolist() if node >= 0]
        assert len(set(drawn)) == len(drawn) == len(want)
        one = sac_rules.log_probability(*held, drawn, is_causal=is_causal)
        assert_same_maths(logs[row, head, source].detach(), one.detach(), terms=100)
        total = total + one
    wanted = torch.autograd.grad(total, [weights[name] for name, _ in state.named_parameters()])
    for found, want_grad in zip(gradients, wanted, strict=True):
        assert_same_maths(found, want_grad, terms=1000)


def test_buckets_of_distances_equal_the_definition() -> None:
    distances = torch.arange(-300, 301)
    wanted = [sac_rules.bucket(distance) for distance in distances.tolist()]
    assert buckets_of(distances).tolist() == wanted
    assert set(wanted) == set(range(BUCKETS)) - {BUCKETS // 2}


def test_sampled_picks_come_as_often_as_they_are_likely() -> None:
    state, rows = predictor(heads=1), 20000
    hidden = hidden_of(3, rows=1).expand(rows, -1, -1)
    nodes, weights = Nodes(hidden, hidden), dict(state.state_dict())
    torch.manual_seed(0)
    picks = state.pick(nodes, 2, heads=ALL, is_causal=False, is_sampled=True)[:, 0, 1]
    for pair in itertools.permutations(range(3), 2):
        log = sac_rules.log_probability(weights, hidden[0], hidden[0], 0, 1, pair, is_causal=False)
        likely, share = log.exp().item(), (picks == torch.tensor(pair)).all(1).double().mean().item()
        # five standard deviations
        assert abs(share - likely) < 5 * (likely * (1 - likely) / rows) ** 0.5


@both_ways
@granularities
def test_tokens_of_a_padded_row_pick_as_they_do_alone(fields: dict[str, Any], is_causal: bool) -> None:
    pattern, state, n = made(**fields), predictor(), 22
    tensors, hidden = random_tensors(batch=3, heads=HEADS, tokens=n), hidden_of(n, rows=3)
    stretches = [(0, 15), (9, 22), (3, 20)]
    is_real = torch.zeros(3, n, dtype=torch.bool)
    for row, (start, stop) in enumerate(stretches):
        is_real[row, start:stop] = True
    held: dict[str, Any] = {"state": state, "is_causal": is_causal}
    out: Any = hf_sparse.sparse_attention(*tensors, pattern, key_padding_mask=is_real, hidden_states=hidden, **held)
    for row, (start, stop) in enumerate(stretches):
        at = slice(start, stop)
        own = (t[row : row + 1, :, at] for t in tensors)
        alone: Any = hf_sparse.sparse_attention(*own, pattern, hidden_states=hidden[row : row + 1, at], **held)
        assert_same_maths(out[row : row + 1, :, at], alone, terms=n)


@granularities
def test_a_prefix_gives_what_it_gives_alone(fields: dict[str, Any]) -> None:
    pattern, state, n = made(**fields), predictor(), 22
    tensors, hidden = random_tensors(heads=HEADS, tokens=n), hidden_of(n, rows=1)
    held: dict[str, Any] = {"state": state, "is_causal": True}
    whole: Any = hf_sparse.sparse_attention(*tensors, pattern, hidden_states=hidden, **held)
    for p in range(1, n):
        own = (t[:, :, :p] for t in tensors)
        alone: Any = hf_sparse.sparse_attention(*own, pattern, hidden_states=hidden[:, :p], **held)
        assert_same_maths(whole[:, :, :p], alone, terms=n)
        changed = torch.cat([hidden[:, :p], 5 - hidden[:, p:]], 1)
        after: Any = hf_sparse.sparse_attention(*tensors, pattern, hidden_states=changed, **held)
        assert_same_maths(after[:, :, :p], whole[:, :, :p], terms=n)


@both_ways
@granularities
def test_all_nodes_picked_is_dense_attention(fields: dict[str, Any], is_causal: bool) -> None:
    n = 22
    tensors, hidden = random_tensors(heads=HEADS, tokens=n), hidden_of(n, rows=1)
    wanted = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=is_causal)
    opened = made(**fields).wide_open(n)
    out: Any = hf_sparse.sparse_attention(
        *tensors, opened, is_causal=is_causal, state=predictor(), hidden_states=hidden
    )
    assert_same_maths(out.detach(), wanted, terms=n)
    assert opened.density(n) == 1
    # one node short of all: the LSTM goes through the others
    almost = made(**{**fields, "edges_per_token": n - fields.get("block_size", 1)})
    other: Any = hf_sparse.sparse_attention(
        *tensors, almost, is_causal=is_causal, state=predictor(), hidden_states=hidden
    )
    assert not torch.allclose(other, wanted)


@granularities
def test_heads_that_share_keys_pick_apart(fields: dict[str, Any]) -> None:
    pattern, n = made(**fields), 22
    tensors, hidden, state = random_tensors(heads=4, key_heads=2, tokens=n), hidden_of(n, rows=1), predictor(heads=4)
    query, key, value = tensors
    repeated = query, *(t.repeat_interleave(2, 1) for t in (key, value))
    held: dict[str, Any] = {"state": state, "hidden_states": hidden}
    out, wanted = (hf_sparse.sparse_attention(*given, pattern, **held) for given in (tensors, repeated))
    assert isinstance(out, Tensor)
    assert isinstance(wanted, Tensor)
    assert_same_maths(out.detach(), wanted.detach(), terms=n)
    picked = [wanted_picks(pattern, state, hidden[0], head, False) for head in range(4)]
    assert len({str(one) for one in picked}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_dense(dtype: torch.dtype) -> None:
    pattern, state, n = made(block_size=BLOCK, edges_per_token=8), predictor().to(dtype), 22
    tensors, hidden = [t.to(dtype) for t in random_tensors(heads=HEADS, tokens=n)], hidden_of(n, rows=1).to(dtype)
    # picked in float32 from what was rounded
    exact: Any = hf_sparse.sparse_attention(
        *(t.float() for t in tensors), pattern, state=state.float(), hidden_states=hidden.float()
    )
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors)
    true = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in tensors))
    actual: Any = hf_sparse.sparse_attention(*tensors, pattern, state=state.to(dtype), hidden_states=hidden)
    exact = exact.double()
    assert_within_rounding(actual, exact, (exact + (dense.double() - true)).to(dtype))


@both_ways
@granularities
def test_the_density_is_no_less_than_the_pairs_read(fields: dict[str, Any], is_causal: bool) -> None:
    identity_of = torch.eye(22, dtype=torch.float64).expand(1, HEADS, -1, -1)
    for n, radius in itertools.product(LENGTHS, (0, 2, 30)):
        query, key, _ = random_tensors(heads=HEADS, tokens=n)
        pattern, held = made(**fields, radius=radius), {"state": predictor(), "hidden_states": hidden_of(n, rows=1)}
        weights: Any = hf_sparse.sparse_attention(
            query, key, identity_of[..., :n, :n], pattern, is_causal=is_causal, **held
        )
        read, most = (weights > 0).double().mean().item(), pattern.density(n, is_causal=is_causal)
        assert read <= most + 1e-9
        assert most <= (1 if not is_causal else (n + 1) / (2 * n))
    # whole blocks, and a band of the token alone
    whole = made(block_size=4, edges_per_token=8, radius=0)
    assert whole.density(16) == pytest.approx(8 / 16 + 1 / 16)
    assert whole.density(16, is_causal=True) == pytest.approx(7 * 16 / 256 + 1 / 16)


@both_ways
def test_the_gradient_of_sampled_edges_is_that_of_the_expected_reward(is_causal: bool) -> None:
    """REINFORCE at 4 tokens, over every choice of edges: two picks of each source if causal, else one."""
    n, steps, state = 4, 2 if is_causal else 1, predictor(heads=1, spread=0.5)
    hidden = hidden_of(n, rows=1)
    weights = {name: held.detach().requires_grad_() for name, held in state.state_dict().items()}
    counts = [min(steps, source + 1) if is_causal else steps for source in range(n)]
    owners = [(source, step) for source in range(n) for step in range(counts[source])]
    query, key, value = (t[0, 0] for t in random_tensors(heads=1, tokens=n))

    def split(choice: tuple[int, ...]) -> list[list[int]]:
        ends = list(itertools.accumulate(counts, initial=0))
        return [list(choice[a:b]) for a, b in itertools.pairwise(ends)]

    def reward(choice: tuple[int, ...]) -> float:
        table = sac_rules.edges(split(choice), n, 1, 0, is_causal=is_causal)
        out, _ = attend_counts(query, key, value, table, SCALE, self_is_last_resort=False)
        return -out.square().sum().item()

    def logits_of(before: tuple[int, ...]) -> Tensor:
        source, step = owners[len(before)]
        own = before[len(before) - step :]
        return sac_rules.logits(weights, hidden[0], hidden[0], 0, source, own, is_causal=is_causal)

    expected = enumerate_choices(logits_of, reward, len(owners))
    # a code of the distance is read before a second pick alone
    leaves = [weights[name] for name, _ in state.named_parameters()]
    wanted = torch.autograd.grad(expected, leaves, materialize_grads=True)
    choices = []
    for sources in itertools.product(
        *(itertools.permutations(range(s + 1 if is_causal else n), counts[s]) for s in range(n))
    ):
        choices.append([[*picks, *[-1] * (steps - len(picks))] for picks in sources])
    assert len(choices) == (144 if is_causal else 256)
    rewards = torch.tensor(
        [reward(tuple(node for picks in one for node in picks if node >= 0)) for one in choices], dtype=torch.float64
    )
    # all choices as rows of one batch
    rows = hidden.expand(len(choices), -1, -1)
    logs = state.log_probabilities(Nodes(rows, rows), torch.tensor(choices)[:, None], is_causal).sum((1, 2))
    chances = logs.detach().exp()
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (chances * rewards).sum().item() == pytest.approx(expected.item(), abs=1e-10)
    found = torch.autograd.grad((chances * rewards * logs).sum(), list(state.parameters()), materialize_grads=True)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-8, rtol=0)
    assert max(one.abs().max().item() for one in wanted) > 1e-3


def test_a_predictor_starts_the_same_everywhere_and_its_heads_apart() -> None:
    torch.manual_seed(1)
    one = EdgePredictor(HIDDEN, 2, 8)
    torch.manual_seed(2)
    other = EdgePredictor(HIDDEN, 2, 8)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    hidden = hidden_of(30, rows=1).float()
    picks = one.pick(Nodes(hidden, hidden), 3, heads=ALL, is_causal=False, is_sampled=False)
    assert not torch.equal(picks[:, 0], picks[:, 1])


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"edges_per_token": 0}, ValueError, "edges_per_token must be at least 1, got 0"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"predictor_size": 0}, ValueError, "predictor_size must be at least 1"),
        ({"radius": -1}, ValueError, "radius must be at least 0"),
        ({"radius": 1.5}, TypeError, "radius must be a whole number"),
        ({"granularity": "word"}, ValueError, "granularity must be one of block, token; got 'word'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        made(**fields)


def test_it_needs_its_state_and_hidden_states() -> None:
    tensors, said = random_tensors(heads=HEADS, tokens=9), "needs the state that make_state makes, and hidden_states"
    with pytest.raises(ValueError, match=said):
        hf_sparse.sparse_attention(*tensors, made())
    with pytest.raises(ValueError, match=said):
        hf_sparse.sparse_attention(*tensors, made(), state=predictor())
    with pytest.raises(ValueError, match=said):
        hf_sparse.sparse_attention(*tensors, made(), state=torch.nn.Linear(2, 2), hidden_states=hidden_of(9, rows=1))
