"""Spans that each layer pools anew: a node weighs as much as its tokens do together."""

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests.pattern_cases import BACKENDS, HEADS, attention
from tests.support import system_rules
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4
POOLED = hf_sparse.pattern("bp_transformer", nodes_per_level=2, spans="pooled")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


def pooled_by_loops(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Attend to tokens and to the means of spans, whose scores gain the logarithm of their size."""
    n = query.shape[2]
    leaves = system_rules.leaves_of_nodes(n)
    keys, values = (torch.stack([t[:, :, held].mean(2) for held in leaves], 2) for t in (key, value))
    bias = torch.tensor([len(held) for held in leaves], dtype=torch.float64).log()
    mask = system_rules.bp_transformer(n, nodes_per_level=2, is_causal=is_causal)[:, :n].expand(HEADS, -1, -1)
    bias = bias.expand(query.shape[0], HEADS, n, -1)
    return attend_by_rows(query, keys, values, mask.expand(query.shape[0], -1, -1, -1), bias=bias)


@both_backends
@both_ways
@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_outputs_and_gradients_equal_the_loop_oracle(n: int, is_causal: bool, backend: str) -> None:
    tensors = random_tensors(batch=2, tokens=n, key_heads=2, width=WIDTH, value_width=3)
    wanted = with_gradients(lambda q, k, v: pooled_by_loops(q, k, v, is_causal=is_causal), tensors)
    attend = attention(POOLED, is_causal=is_causal, backend=backend, return_lse=True)
    for actual, oracle in zip(with_gradients(attend, tensors), wanted, strict=True):
        assert_same_maths(actual, oracle, terms=n + WIDTH)


@both_backends
@both_ways
def test_wide_open_equals_dense(is_causal: bool, backend: str) -> None:
    n = 40
    tensors = random_tensors(tokens=n, width=WIDTH)
    mask = torch.ones(1, HEADS, n, n).tril(0 if is_causal else n).bool()
    out = attention(POOLED.wide_open(n), is_causal=is_causal, backend=backend)(*tensors)
    assert_same_maths(out, attend_by_rows(*tensors, mask)[0], terms=n + WIDTH)


@both_ways
def test_tokens_that_are_all_alike_are_read_as_by_dense_attention(is_causal: bool) -> None:
    # far tokens in stretches of equal keys and values: their spans lose nothing
    n = 64
    query, key, value = random_tensors(tokens=n, width=WIDTH)
    alike = [t[:, :, :1].expand(-1, -1, n, -1) for t in (key, value)]
    mask = torch.ones(1, HEADS, n, n).tril(0 if is_causal else n).bool()
    out, lse = attention(POOLED, is_causal=is_causal, return_lse=True)(query, *alike)
    wanted, wanted_lse = attend_by_rows(query, *alike, mask)
    assert_same_maths(out, wanted, terms=n + WIDTH)
    assert_same_maths(lse, wanted_lse, terms=n + WIDTH)


@both_backends
def test_rows_of_a_padded_batch_equal_rows_alone(backend: str) -> None:
    stretches = [(0, 30), (0, 13), (11, 30), (5, 6)]
    tensors = random_tensors(batch=5, tokens=30, width=WIDTH)
    is_real = torch.zeros(5, 30, dtype=torch.bool)
    for row, (start, stop) in enumerate(stretches):
        is_real[row, start:stop] = True
    out = attention(POOLED, backend=backend)(*tensors, key_padding_mask=is_real)
    if backend != "dense":
        # what padding holds reaches nobody, not even by a sum; the dense reference multiplies it by 0
        poisoned = [t.masked_fill(~is_real[:, None, :, None], float("inf")) for t in tensors[1:]]
        again = attention(POOLED, backend=backend)(tensors[0], *poisoned, key_padding_mask=is_real)
        assert torch.equal(again, out)
    for row, (start, stop) in enumerate(stretches):
        alone = attention(POOLED)(*(t[row : row + 1, :, start:stop] for t in tensors))
        assert_same_maths(out[row : row + 1, :, start:stop], alone, terms=30 + WIDTH)
    assert not out.masked_select(~is_real[:, None, :, None]).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_and_is_computed_in_float32(dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in random_tensors(tokens=65, width=WIDTH)]
    out, lse = attention(POOLED, return_lse=True)(*tensors)
    wanted = attention(POOLED)(*(t.float() for t in tensors))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert torch.equal(out, wanted.to(dtype))


def test_what_it_cannot_serve_is_refused_by_name() -> None:
    tensors = random_tensors(tokens=10, width=WIDTH)
    is_real = torch.tensor([[True, True, False, True, True, True, True, True, True, True]])
    with pytest.raises(ValueError, match="'bp_transformer' does not serve padding between real tokens"):
        attention(POOLED)(*tensors, key_padding_mask=is_real)
    for name, value in (("bias", torch.zeros(10, 10)), ("softcap", 3.0), ("distance_bias", torch.zeros(4, 3))):
        with pytest.raises(ValueError, match=f"'bp_transformer' has nodes .* does not serve {name}"):
            attention(POOLED, **{name: value})(*tensors)
    with pytest.raises(ValueError, match="does not serve cached decoding"):
        attention(POOLED)(tensors[0][:, :, -1:], *tensors[1:])
    with pytest.raises(ValueError, match="clip_distance must be 0 where spans are pooled"):
        hf_sparse.pattern("bp_transformer", spans="pooled", clip_distance=2)


def test_a_scale_of_nothing_is_refused() -> None:
    tensors = [torch.randn(1, 2, 9, 4) for _ in range(3)]
    with pytest.raises(ValueError, match="so scale must not be 0"):
        hf_sparse.sparse_attention(*tensors, hf_sparse.pattern("bp_transformer", spans="pooled"), scale=0.0)
