"""The laws for patterns with nodes behind the tokens: oracle, padding, causality over layers, dropout, refusals."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.labels import RelativeLabels
from tests.pattern_cases import BACKENDS, HEADS, Setting, attention, random_table
from tests.support import system_rules
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4
both_backends = pytest.mark.parametrize("backend", BACKENDS)
_make = hf_sparse.pattern


@dataclass(frozen=True)
class NodeCase:
    """A pattern with nodes, and its definition as a table of ``n`` tokens and their nodes."""

    name: str
    pattern: Pattern
    table: Callable[..., Tensor]
    can_be_causal: bool = True

    @functools.cache  # noqa: B019 - the cases live as long as the tests do
    def mask(self, n: int, is_causal: bool = False) -> Tensor:
        """Draw the definition: bool ``[HEADS, n + nodes, n + nodes]``."""
        return self.table(n, is_causal=is_causal).expand(HEADS, -1, -1)


def _etc(**fields: Any) -> NodeCase:
    name = "_".join(["etc", *(key for key in fields if key not in ("radius", "num_global"))])
    table = functools.partial(system_rules.etc, **fields)
    return NodeCase(name, _make("etc", **fields), table, can_be_causal="segments" not in fields)


def _ring(**fields: Any) -> NodeCase:
    return NodeCase("star", _make("star", **fields), functools.partial(system_rules.star, **fields))


def _bigbird(n: int, *, is_causal: bool) -> Tensor:
    """Draw the definition over the random blocks that the pattern has without nodes."""
    table = random_table(_make("bigbird", **_BLOCKS), Setting(n, is_causal=is_causal))
    return system_rules.bigbird_external(n, _BLOCKS["block_size"], table, 3, is_causal=is_causal)


_BLOCKS: dict[str, Any] = {"block_size": 8, "num_random_blocks": 1, "random_plan": "full_length"}
_HARD = {"hard_global_to_long": True}, {"hard_long_to_global": True}
CASES = (
    _ring(radius=1, num_relays=2),
    _etc(radius=3, num_global=5),
    _etc(radius=3, segments=8),
    _etc(radius=3, segments=8, **_HARD[0]),
    _etc(radius=3, segments=8, **_HARD[1]),
    _etc(radius=3, segments=8, **_HARD[0], **_HARD[1]),
    NodeCase(
        "bp_transformer",
        _make("bp_transformer", nodes_per_level=2),
        functools.partial(system_rules.bp_transformer, nodes_per_level=2),
    ),
    NodeCase("bigbird", _make("bigbird", **_BLOCKS, num_external_global=3), _bigbird),
)
all_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CAUSAL = pytest.mark.parametrize("case", [c for c in CASES if c.can_be_causal], ids=lambda case: case.name)


def total(case: NodeCase, n: int) -> int:
    return n + case.pattern.num_nodes(n)


def check(case: NodeCase, n: int, is_causal: bool, backend: str) -> None:
    """Compare outputs, logsumexps and gradients with the loop oracle."""
    tensors = random_tensors(tokens=total(case, n), key_heads=2, width=WIDTH)
    mask = case.mask(n, is_causal)[None]
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask), tensors)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend, return_lse=True)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


@both_backends
@pytest.mark.parametrize("n", [1, 7, 65])
@all_cases
def test_outputs_and_gradients_equal_the_loop_oracle(case: NodeCase, n: int, backend: str) -> None:
    check(case, n, False, backend)


@both_backends
@pytest.mark.parametrize("n", [1, 65])
@CAUSAL
def test_causal_outputs_and_gradients_equal_the_loop_oracle(case: NodeCase, n: int, backend: str) -> None:
    check(case, n, True, backend)


@all_cases
def test_long_sequences_equal_the_loop_oracle(case: NodeCase) -> None:
    check(case, 259, False, "gather")


@both_backends
@all_cases
def test_rows_of_a_padded_batch_equal_rows_alone(case: NodeCase, backend: str) -> None:
    n, stretches = 40, [(0, 40), (0, 23), (11, 40), (5, 6)]
    tensors = random_tensors(batch=4, tokens=total(case, n), width=WIDTH)
    is_real = torch.zeros(4, total(case, n), dtype=torch.bool)
    attend = attention(case.pattern, backend=backend)
    for row, (start, stop) in enumerate(stretches):
        is_real[row, start:stop] = True
    # what a mask says of nodes is not read
    is_real[1:, n:] = True
    leaves = [tensor.requires_grad_() for tensor in tensors]
    out = attend(*leaves, key_padding_mask=is_real)
    for row, (start, stop) in enumerate(stretches):
        nodes = case.pattern.num_nodes(stop - start)
        at = torch.tensor([*range(start, stop), *range(n, n + nodes)])
        alone = attend(*(tensor[row : row + 1, :, at] for tensor in tensors))
        assert_same_maths(out[row : row + 1, :, at], alone, terms=n + WIDTH)
        apart = torch.ones(total(case, n), dtype=torch.bool)
        apart[at] = False
        assert not out[row, :, apart].any()
        # what is not real gets no gradient and gives none
        grads = torch.autograd.grad(out[row].sum(), leaves, retain_graph=True)
        assert not any(grad[row, :, apart].any() for grad in grads)


@both_backends
@all_cases
def test_dropout_is_drawn_alike_and_replays(case: NodeCase, backend: str) -> None:
    n = total(case, 30)
    query, key, _ = random_tensors(tokens=n, width=WIDTH)
    identity = torch.eye(n, dtype=torch.float64).expand(1, HEADS, -1, -1)
    attend = attention(case.pattern, backend=backend, dropout=0.3)
    torch.manual_seed(7)
    is_kept = attend(query, key, identity) > 0
    mask, multiplier = case.mask(30)[None], is_kept.double() / 0.7
    tensors = random_tensors(tokens=n, width=WIDTH)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask, multiplier=multiplier)[0], tensors)
    torch.manual_seed(7)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


@both_backends
@CAUSAL
def test_no_token_learns_of_later_ones_through_nodes_in_three_layers(case: NodeCase, backend: str) -> None:
    n, p = 30, 17

    def layers(tokens: Tensor, nodes: Tensor) -> Tensor:
        hidden = torch.cat([tokens, nodes], 2)
        for layer in range(3):
            attend = attention(case.pattern, backend=backend, is_causal=True, layer=layer)
            hidden = hidden + attend(hidden, hidden, hidden)
        return hidden[:, :, :n]

    # nodes start as zeros here: as means of tokens they would know the end from the start, which integration/nodes.py sees to
    tokens, nodes = torch.randn(2, 1, HEADS, total(case, n), WIDTH, dtype=torch.float64).unbind()
    tokens, nodes = tokens[:, :, :n], 0.0 * nodes[:, :, n:]
    changed = torch.cat([tokens[:, :, :p], 5.0 - tokens[:, :, p:]], 2)
    before, after = layers(tokens, nodes), layers(changed, nodes)
    assert torch.equal(before[:, :, :p], after[:, :, :p])
    assert not torch.equal(before[:, :, p:], after[:, :, p:])


def relative(lag: int, most: int) -> int:
    """Return the label of a distance: 0 ... most to the right, then to the left."""
    return min(lag, most) if lag >= 0 else most + min(-lag, most)


def etc_label(q: int, k: int, n: int, most: int, segments: int | None) -> int:
    """Return the label of a pair: of rows of tokens and of nodes, each a distance, or whether a token is of a node's block."""
    if (q < n) == (k < n):
        label = relative(k - q, most)
    else:
        token, node = min(q, k), max(q, k) - n
        label = 2 * most + 1 + int(segments is not None and token // segments == node)
    return label + (2 * most + 3) * (q >= n)


@both_backends
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("segments", [None, 8])
@pytest.mark.parametrize("n", [1, 7, 65])
def test_labels_of_etc_equal_the_loop_oracle(n: int, segments: int | None, is_padded: bool, backend: str) -> None:
    most, pattern = 3, _make("etc", radius=5, num_global=3, max_relative_distance=3, segments=segments)
    state: Any = pattern.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    torch.manual_seed(1)
    for parameter in state.double().parameters():
        torch.nn.init.normal_(parameter)
    # padding on the left moves neither tokens nor nodes
    before = 4 if is_padded else 0
    total = before + n + pattern.num_nodes(before + n)
    at = torch.tensor([*range(before, before + n), *range(before + n, before + n + pattern.num_nodes(n))])
    is_real = torch.ones(1, total, dtype=torch.bool)
    is_real[:, :before] = False
    labels = [[etc_label(q, k, n, most, segments) for k in range(len(at))] for q in range(len(at))]
    mask = pattern.mask(n, heads=HEADS)[None]

    def looped(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        query, key, value = query[:, :, at], key[:, :, at], value[:, :, at]
        own = keys[torch.tensor(labels)]
        added = (
            torch.einsum("bhqd,qkhd->bhqk", query, own) + bias[torch.tensor(labels)].permute(2, 0, 1)
        ) * WIDTH**-0.5
        return attend_by_rows(query, key, value, mask, bias=added)[0]

    def ours(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
        held = {"keys": keys, "bias": bias}
        label_state = _Functional(state, held)
        settings = {"key_padding_mask": is_real, "backend": backend, "state": label_state}
        return attention(pattern, **settings)(query, key, value)[:, :, at]

    tensors = (*random_tensors(tokens=total, width=WIDTH), state.keys, state.bias)
    for actual, oracle in zip(with_gradients(ours, tensors), with_gradients(looped, tensors), strict=True):
        assert_same_maths(actual, oracle, terms=total + WIDTH)


@pytest.mark.parametrize("key", ["etc", "bp_transformer"])
def test_labels_of_runs_of_blocks_equal_the_dense_backend(key: str) -> None:
    own = {"radius": 5, "num_global": 3} if key == "etc" else {"nodes_per_level": 2, "clip_distance": 2}
    n, pattern = 400, _make(key, **own)
    state: Any = pattern.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    torch.manual_seed(1)
    for parameter in state.double().parameters():
        torch.nn.init.normal_(parameter)
    tensors = random_tensors(tokens=n + pattern.num_nodes(n), width=WIDTH)
    results, wanted = (
        with_gradients(attention(pattern, backend=backend, state=state), tensors) for backend in ("gather", "dense")
    )
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


class _Functional(RelativeLabels):
    """A state that reads given tensors in the place of its parameters, so that gradients by them can be asked for."""

    def __init__(self, state: RelativeLabels, held: dict[str, Tensor]) -> None:
        torch.nn.Module.__init__(self)
        self.own, self.held = [state], held

    def forward(self, query: Tensor, **settings: Any) -> Tensor:
        found: Tensor = torch.func.functional_call(self.own[0], self.held, (query,), settings)
        return found


@both_backends
def test_labels_of_spans_are_told_apart_by_level_side_and_place(backend: str) -> None:
    n, pattern = 65, _make("bp_transformer", nodes_per_level=2, clip_distance=2)
    plain = _make("bp_transformer", nodes_per_level=2)
    state: Any = pattern.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    assert state.keys.shape == (15, 1, WIDTH)
    tensors = random_tensors(tokens=n + pattern.num_nodes(n), width=WIDTH)
    # labels of zeros change nothing
    assert_same_maths(
        attention(pattern, backend=backend, state=state.double())(*tensors),
        attention(plain, backend=backend)(*tensors),
        terms=n + WIDTH,
    )
    scope = Scope(8, 1, nodes=pattern.num_nodes(8))
    # by hand: 8 tokens, pairs at 8 to 11, fours at 12 and 13, the root at 14; a level has five labels: itself, left, right, ...
    by_hand = {
        0: {0: 0, 1: 2, 2: 4, 3: 4, 10: 7, 11: 9},
        3: {3: 0, 2: 1, 1: 3, 0: 3, 4: 2, 5: 4, 11: 7},
        7: {7: 0, 6: 1, 5: 3, 4: 3, 9: 6, 8: 8},
    }
    for token, wanted in by_hand.items():
        reads = pattern.mask(8)[0, token].nonzero()[:, 0]
        labels = pattern.label(torch.tensor(token), reads, scope)
        assert dict(zip(reads.tolist(), labels.tolist(), strict=True)) == wanted
    # spans read their tokens under a label for each level, clipped
    spans = pattern.label(torch.tensor([[8], [12], [14]]), torch.tensor([0]), scope)[:, 0]
    assert spans.tolist() == [5, 10, 10]


@pytest.mark.parametrize("what", ["document_ids", "query_positions", "a single query"])
def test_what_nodes_cannot_serve_is_refused_by_name(what: str) -> None:
    case = CASES[0]
    query, key, value = random_tensors(tokens=total(case, 10), width=WIDTH)
    ids = torch.zeros(1, total(case, 10), dtype=torch.int64)
    settings: dict[str, Any] = {} if what == "a single query" else {what: ids}
    name = "document_ids" if what == "document_ids" else "cached decoding"
    with pytest.raises(ValueError, match=f"pattern 'star' has nodes .* does not serve {name}"):
        attention(case.pattern, **settings)(query[:, :, -1:] if what == "a single query" else query, key, value)


def test_a_number_of_positions_that_no_tokens_have_is_refused() -> None:
    # 3 tokens have 3 spans, 4 have 3: 8 positions are neither
    tensors = random_tensors(tokens=8, width=WIDTH)
    with pytest.raises(ValueError, match="8 positions are no number of tokens with its nodes"):
        attention(_make("bp_transformer"))(*tensors)


@pytest.mark.parametrize("name", ["star", "etc"])
def test_a_state_of_another_pattern_is_refused(name: str) -> None:
    other = _make("etc", num_global=2, max_relative_distance=5)
    state = other.make_state(hidden_size=8, num_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH)
    own = _make("star", num_relays=2) if name == "star" else _make("etc", num_global=2, max_relative_distance=2)
    with pytest.raises(ValueError, match=rf"the state has 26 labels, but pattern '{name}' has {own.num_labels}"):
        attention(own, state=state)(*random_tensors(tokens=12, width=WIDTH))


def test_flex_refuses_nodes_by_name() -> None:
    tensors = random_tensors(tokens=total(CASES[0], 10), width=WIDTH)
    with pytest.raises(ValueError, match="backend 'flex' does not serve pattern 'star'; pass backend='gather'"):
        attention(CASES[0].pattern, backend="flex")(*tensors)


@pytest.mark.parametrize("name", ["bp_transformer", "etc_segments_hard_global_to_long_hard_long_to_global", "star"])
def test_nodes_beside_random_blocks_that_differ_by_head_equal_the_dense_backend(name: str) -> None:
    (case,) = (case for case in CASES if case.name == name)
    made = _make("random", block_size=4, num_random_blocks=2) | case.pattern
    n = 65
    drawn = made.mask(n, heads=HEADS)
    assert not torch.equal(drawn[0], drawn[1])
    assert made.density(n, heads=HEADS) == pytest.approx(drawn.sum().item() / (HEADS * n * n))
    tensors = random_tensors(tokens=total(case, n), width=WIDTH)
    results, wanted = (with_gradients(attention(made, backend=backend), tensors) for backend in ("gather", "dense"))
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


def test_unions_have_the_nodes_of_one_member() -> None:
    made = _make("star") | _make("strided", stride=5)
    n = 20
    mask = made.mask(n)
    assert mask.shape == (1, 21, 21)
    strided = _make("strided", stride=5).mask(n)
    assert torch.equal(mask[:, :n, :n], _make("star").mask(n)[:, :n, :n] | strided)
    assert torch.equal(mask[:, n:], _make("star").mask(n)[:, n:])
    with pytest.raises(ValueError, match="at most one member of a combination may have nodes"):
        made | _make("etc")
