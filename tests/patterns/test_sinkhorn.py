"""Sinkhorn: the matrix of blocks, mixtures and choices, SortCut, the learned net, and bad fields."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns.sinkhorn import SortNet, sinkhorn
from tests.patterns.content_checks import HEADS, SCALE, WIDTH, check_against
from tests.support import content_rules

BLOCK = 4
LENGTHS = (1, 3, 4, 5, 8, 9, 22)
both_ways = pytest.mark.parametrize("is_causal", [False, True])


def made(**fields: Any) -> hf_sparse.Pattern:
    return hf_sparse.pattern("sinkhorn", **{"block_size": BLOCK, "temperature": 0.5, "iterations": 5, **fields})


def scores_of(query: Tensor, key: Tensor, is_causal: bool, *, bars_own: bool = True) -> Tensor:
    """Return the scores of blocks over the temperature: mean queries, if causal those up to a block's first, and mean keys."""
    n = len(query)
    blocks = [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    means = [sum(key[t] for t in block) / len(block) for block in blocks]
    rows = []
    for i, block in enumerate(blocks):
        asked = range(block[0] + 1) if is_causal else block
        mean = sum(query[t] for t in asked) / len(asked)
        row = [mean @ other / math.sqrt(WIDTH) / 0.5 for other in means]
        if bars_own and not is_causal:
            row[i] = query.new_tensor(float("-inf"))
        rows.append(torch.stack(row))  # type: ignore[arg-type]
    return torch.stack(rows)


def mixing_of(query: Tensor, key: Tensor, is_causal: bool, *, bars_own: bool = True) -> Tensor:
    n = len(query)
    if n <= BLOCK:
        return query.new_zeros(1, 1)
    return content_rules.sinkhorn_log(scores_of(query, key, is_causal, bars_own=bars_own), 5, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("n", LENGTHS)
def test_mixtures_equal_the_definition(n: int, is_causal: bool) -> None:
    def oracle(query: Tensor, key: Tensor, value: Tensor, row: int, head: int) -> tuple[Tensor, Tensor]:
        mixing = mixing_of(query, key, is_causal)
        return content_rules.sinkhorn_attention(query, key, value, mixing, BLOCK, SCALE, is_causal=is_causal)

    check_against(made(), oracle, n, is_causal=is_causal)


@both_ways
@pytest.mark.parametrize("n", LENGTHS)
def test_choices_equal_the_definition(n: int, is_causal: bool) -> None:
    """Outputs alone: the gradient of a choice is that of the mixture, which the next test looks at."""
    tensors = [
        torch.randn(1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for _ in "qkv"
    ]
    query, key, value = (t[0] for t in tensors)
    wanted = []
    for head in range(HEADS):
        mixing = mixing_of(query[head], key[head], is_causal)
        assigned = [[int(row.argmax())] if row.sum() else [] for row in mixing]
        table = content_rules.sinkhorn_hard(assigned, n, BLOCK, is_causal=is_causal)
        held = query[head], key[head], value[head], table, SCALE
        wanted.append(content_rules.attend_counts(*held, self_is_last_resort=False)[0])
    for backend in ("gather", "dense"):
        with torch.no_grad():
            found: Any = hf_sparse.sparse_attention(*tensors, made(hard=True), is_causal=is_causal, backend=backend)
        assert torch.allclose(found[0], torch.stack(wanted), atol=1e-12)
        with_grad: Any = hf_sparse.sparse_attention(
            *(t.requires_grad_() for t in tensors), made(hard=True), is_causal=is_causal, backend=backend
        )
        assert torch.allclose(with_grad, found, atol=1e-12)


def test_a_choice_has_the_gradient_of_its_mixture() -> None:
    n, generator = 16, torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1, n, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in "qkv"]
    query, key, value = (t[0, 0] for t in tensors)
    soft = mixing_of(query, key, False)
    one_hot = torch.nn.functional.one_hot(soft.argmax(1), len(soft)).double()
    straight = one_hot + soft - soft.detach()
    blocks = [range(start, start + BLOCK) for start in range(0, n, BLOCK)]
    rows = []
    for i, own in enumerate(blocks):
        mixed = [sum(straight[i, j] * x[blocks[j]] for j in range(len(blocks))) for x in (key, value)]
        keys, values = (torch.cat([new, x[own]]) for new, x in zip(mixed, (key, value), strict=True))  # type: ignore[list-item]
        rows.append((query[own] @ keys.t() * SCALE).softmax(1) @ values)
    pull = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((torch.cat(rows) * pull).sum(), tensors)
    out: Any = hf_sparse.sparse_attention(*tensors, made(hard=True))
    found = torch.autograd.grad((out[0, 0] * pull).sum(), tensors)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 9])
@pytest.mark.parametrize("n", [3, 8, 22])
def test_sortcut_reads_the_first_sorted_blocks_alone(n: int, cut: int, hard: bool) -> None:
    tensors = [
        torch.randn(1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for _ in "qkv"
    ]
    with torch.no_grad():
        found: Any = hf_sparse.sparse_attention(*tensors, made(sortcut=cut, hard=hard))
    for head in range(HEADS):
        query, key, value = (t[0, head] for t in tensors)
        mixing = mixing_of(query, key, False, bars_own=False)
        if n <= BLOCK:
            table = torch.ones(n, n, dtype=torch.bool)
            keys, values = key, value
        elif hard:
            table = content_rules.sortcut([int(row.argmax()) for row in mixing], n, BLOCK, cut)
            keys, values = key, value
        else:
            places = [range(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
            keys, values = (
                torch.stack(
                    [
                        sum(row[j] * x[block[t]] for j, block in enumerate(places) if t < len(block))
                        for row in mixing[:cut]
                        for t in range(BLOCK)
                    ]
                )
                for x in (key, value)
            )
            table = torch.ones(n, len(keys), dtype=torch.bool)
        wanted, _ = content_rules.attend_counts(query, keys, values, table, SCALE, self_is_last_resort=False)
        assert torch.allclose(found[0, head], wanted, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 5])
def test_the_matrix_equals_the_definition(iterations: int) -> None:
    scores = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for found, held in zip(sinkhorn(scores, iterations), scores, strict=True):
        assert torch.allclose(found, content_rules.sinkhorn_log(held, iterations, is_causal=False))
    many = sinkhorn(scores, 200)
    assert torch.allclose(many.sum(1), torch.ones(3, 6, dtype=torch.float64))
    assert torch.allclose(many.sum(2), torch.ones(3, 6, dtype=torch.float64))


def test_a_barred_row_is_nothing_and_has_no_gradient() -> None:
    scores = torch.tensor([[float("-inf")] * 2, [0.3, float("-inf")]], requires_grad=True)
    found = sinkhorn(scores, 0)
    assert found.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    (grad,) = torch.autograd.grad(found.sum(), scores)
    assert grad.isfinite().all()


@both_ways
def test_the_learned_net_is_two_layers_on_sums(is_causal: bool) -> None:
    torch.manual_seed(0)
    net = SortNet(6, HEADS, 8).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 11, 6, dtype=torch.float64)
    found = net(hidden, BLOCK, is_causal=is_causal)
    assert found.shape == (2, HEADS, 3, 3)
    for row in range(2):
        for i, stretch in enumerate(
            [range(1), range(5), range(9)] if is_causal else [range(4), range(4, 8), range(8, 11)]
        ):
            pooled = hidden[row, list(stretch)].sum(0)
            inner = (net.inner.weight @ pooled + net.inner.bias).clamp(min=0)
            outer = net.outer.weight @ inner + net.outer.bias
            for head in range(HEADS):
                assert torch.allclose(found[row, head, i], outer[8 * head : 8 * head + 3])


def test_a_learned_net_starts_the_same_everywhere_and_without_a_preference() -> None:
    torch.manual_seed(1)
    one = SortNet(6, HEADS, 8)
    torch.manual_seed(2)
    other = SortNet(6, HEADS, 8)
    assert torch.equal(one.outer.weight, other.outer.weight)
    assert one(torch.randn(1, 8, 6), BLOCK, is_causal=False).abs().max() < 0.1


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"temperature": 0}, ValueError, "temperature must be above 0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"sortcut": 0}, ValueError, "sortcut must be at least 1"),
        ({"hard": 1}, TypeError, "hard must be true or false"),
        ({"sort_net": "deep"}, ValueError, "sort_net must be one of attention, learned"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        made(**fields)


def test_a_learned_net_needs_its_state() -> None:
    tensors = [torch.randn(1, HEADS, 9, WIDTH) for _ in "qkv"]
    with pytest.raises(ValueError, match="sort_net='learned' needs the state that make_state makes, and hidden_states"):
        hf_sparse.sparse_attention(*tensors, made(sort_net="learned"))
