"""Shapes and settings of a call: grouped queries, widths, scale, strides, fewer queries than keys, a share of the heads."""

import functools

import pytest
import torch
from torch import Tensor

from tests.pattern_cases import (
    BACKENDS,
    CASES,
    HEADS,
    SAMPLE,
    WITH_GLOBALS,
    Case,
    Setting,
    attention,
    case_name,
    case_of,
    sampled,
)
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

N, WIDTH = 33, 4
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
some_cases = pytest.mark.parametrize("case", sampled())


def check(case: Case, tensors: tuple[Tensor, ...], backend: str, *, scale: float | None = None) -> None:
    """Compare a call with the oracle, in outputs and gradients."""
    n = tensors[0].shape[2]
    mask = case.mask(Setting(n))[None].expand(len(tensors[0]), -1, -1, -1)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask, scale=scale)[0], tensors)
    attend = attention(case.pattern, backend=backend, scale=scale)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + tensors[2].shape[3])


@both_backends
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@some_cases
def test_query_heads_share_key_heads(case: Case, key_heads: int, backend: str) -> None:
    check(case, random_tensors(tokens=N, key_heads=key_heads, width=WIDTH), backend)


@some_cases
def test_gradients_of_long_rows_of_keys_are_added_head_by_head(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.backends.lanes.MOST_COPIED", 0)
    check(case, random_tensors(tokens=N, key_heads=HEADS, width=WIDTH), "gather")


@both_backends
@pytest.mark.parametrize("value_width", [7])
@some_cases
def test_values_may_have_a_width_of_their_own(case: Case, value_width: int, backend: str) -> None:
    check(case, random_tensors(tokens=N, key_heads=2, width=5, value_width=value_width), backend)


@both_backends
@pytest.mark.parametrize("width", [1, 3, 16])
def test_any_width_works(width: int, backend: str) -> None:
    check(case_of("longformer"), random_tensors(batch=2, tokens=N, width=width), backend)


@both_backends
@pytest.mark.parametrize("scale", [1.0, -0.5])
@some_cases
def test_scale_multiplies_the_scores(case: Case, scale: float, backend: str) -> None:
    check(case, random_tensors(tokens=N, width=WIDTH), backend, scale=scale)


def restride(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the same values in memory that runs through the axes in another order."""
    back = [order.index(axis) for axis in range(4)]
    return tensor.permute(order).contiguous().permute(back)


# 331 tokens are enough for runs of whole blocks
@both_backends
@pytest.mark.parametrize("n", [N, 331])
@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)], ids=["b_t_h_d", "b_h_d_t", "d_t_h_b"])
@pytest.mark.parametrize("case", sampled(names=(*SAMPLE, "band")))
def test_strides_do_not_matter(case: Case, order: tuple[int, ...], n: int, backend: str) -> None:
    tensors = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH)
    strided = tuple(restride(tensor, order) for tensor in tensors)
    assert not strided[0].is_contiguous()
    check(case, strided, backend)


@both_backends
@some_cases
def test_gradients_of_any_stride_are_taken(case: Case, backend: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    attend = attention(case.pattern, backend=backend)
    plain = with_gradients(attend, tensors, weights=torch.ones_like(tensors[0]))
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    # the gradient of a sum is one number seen everywhere, with strides of 0
    expanded = torch.autograd.grad(attend(*leaves).sum(), leaves)
    out = attend(*leaves)
    turned = torch.autograd.grad(out.mT.contiguous(), leaves, torch.ones_like(out.mT))
    for gradients in (expanded, turned):
        for actual, wanted in zip(gradients, plain[1:], strict=True):
            assert_same_maths(actual, wanted, terms=N + WIDTH)


@both_backends
@some_cases
def test_expanded_inputs_work(case: Case, backend: str) -> None:
    query, key, value = random_tensors(tokens=N, key_heads=1, width=WIDTH)
    check(case, (query, key.expand(-1, HEADS, -1, -1), value[..., :1].expand(-1, HEADS, -1, WIDTH)), backend)


@both_backends
def test_inputs_are_left_as_they_were(backend: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    before = [tensor.clone() for tensor in tensors]
    with_gradients(attention(CASES[0].pattern, backend=backend), tensors)
    attention(CASES[0].pattern, backend=backend)(*tensors)
    assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))


@both_backends
@both_ways
@some_cases
def test_fewer_queries_are_the_last_ones(case: Case, is_causal: bool, backend: str) -> None:
    tokens = 6
    query, key, value = random_tensors(tokens=N, key_heads=2, width=WIDTH)
    mask = case.mask(Setting(N, 0, is_causal))[None, :, -tokens:]
    tensors = (query[:, :, -tokens:], key, value)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask)[0], tensors)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)


@both_backends
@both_ways
@some_cases
def test_queries_and_keys_stand_where_their_positions_say(case: Case, is_causal: bool, backend: str) -> None:
    q_at, k_at = torch.tensor([[4, 30, 0, 17, 18]]), torch.tensor([[31, 3, 4, 17, 0, 30, 9, 32, 16, 18]])
    query, key, value = random_tensors(tokens=N, width=WIDTH)
    tensors = (query[:, :, q_at[0]], key[:, :, k_at[0]], value[:, :, k_at[0]])
    mask = case.mask(Setting(N, 0, is_causal))[None, :, q_at[0][:, None], k_at[0]]
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask)[0], tensors)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    attend = functools.partial(attend, query_positions=q_at, key_positions=k_at)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)


@both_backends
@both_ways
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 5)])
@some_cases
def test_fewer_queries_see_padding_as_all_queries_do(
    case: Case, left: int, right: int, is_causal: bool, backend: str
) -> None:
    is_real = torch.ones(1, N, dtype=torch.bool)
    is_real[:, :left] = is_real[:, N - right :] = False
    tensors = random_tensors(tokens=N, width=WIDTH)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    whole = attend(*tensors, key_padding_mask=is_real)
    last = attend(tensors[0][:, :, 10:], *tensors[1:], key_padding_mask=is_real)
    at = is_real[0, 10:]
    assert_same_maths(last[:, :, at], whole[:, :, 10:][:, :, at], terms=N + WIDTH)


@both_backends
@pytest.mark.parametrize("case", WITH_GLOBALS, ids=case_name)
def test_fewer_queries_see_a_global_mask(case: Case, backend: str) -> None:
    is_global = torch.zeros(1, N, dtype=torch.bool)
    is_global[0, [2, 11, 31]] = True
    query, key, value = random_tensors(tokens=N, width=WIDTH)
    mask = case.mask(Setting(N, positions=(2, 11, 31)))[None, :, -8:]
    out = attention(case.pattern, global_mask=is_global, backend=backend)(query[:, :, -8:], key, value)
    assert_same_maths(out, attend_by_rows(query[:, :, -8:], key, value, mask)[0], terms=N + WIDTH)


@both_backends
@both_ways
@some_cases
def test_a_share_of_the_heads_equals_those_heads_of_the_whole(case: Case, is_causal: bool, backend: str) -> None:
    n = 150
    tensors = random_tensors(tokens=n, width=WIDTH)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    whole = attend(*tensors)
    for heads in (slice(0, 1), slice(0, 2), slice(1, 3), slice(2, 4), slice(3, 4)):
        held = attend(*(tensor[:, heads] for tensor in tensors), head_offset=heads.start, num_heads=HEADS)
        assert_same_maths(held, whole[:, heads], terms=n + WIDTH)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@some_cases
def test_backends_agree_at_a_length_of_many_blocks(case: Case, is_causal: bool) -> None:
    tensors = random_tensors(tokens=600, heads=HEADS, key_heads=2, width=8)
    attend = attention(case.pattern, is_causal=is_causal, layer=1, return_lse=True)
    dense = with_gradients(functools.partial(attend, backend="dense"), tensors)
    gather = with_gradients(functools.partial(attend, backend="gather"), tensors)
    for actual, wanted in zip(gather, dense, strict=True):
        assert_same_maths(actual, wanted, terms=600 + 8)
