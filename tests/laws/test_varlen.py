"""The ``varlen`` backend: what it packs and where it puts the results, with a stand-in for the kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.backends.varlen import packed_attention, window_of
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from hf_sparse.segments import find_segments
from tests.pattern_cases import HEADS, attention
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

BAND = hf_sparse.pattern("band", radius=3)
N, WIDTH = 20, 8


def stand_in(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    q_longest: int,
    k_longest: int,
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """Do what ``varlen_attn`` does, sequence by sequence."""
    assert q_ends.dtype == k_ends.dtype == torch.int32
    assert q_longest == k_longest == int(q_ends.diff().max())
    assert given["enable_gqa"] == (query.shape[1] != key.shape[1])
    before, after = (len(query) if reach < 0 else reach for reach in given["window_size"])
    outs, sums = [], []
    for start, stop in zip(q_ends[:-1].tolist(), k_ends[1:].tolist(), strict=True):
        lag = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        mask = ((lag <= before) & (lag >= -after)).expand(1, HEADS, -1, -1)
        held = (t[start:stop].transpose(0, 1)[None] for t in (query, key, value))
        out, lse = attend_by_rows(*held, mask, scale=given["scale"])
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def masks_of(name: str) -> dict[str, Tensor]:
    """Return masks of three rows."""
    column = torch.arange(N)
    real = torch.stack([column >= 6, column < 0, column < 15])
    documents = torch.stack([column // 20, column // 7, column // 9 - 1])
    masks = {"padding": {"key_padding_mask": real}, "documents": {"document_ids": documents}, "nothing": {}}
    return masks.get(name, {"key_padding_mask": torch.zeros(3, N, dtype=torch.bool)})


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["nothing", "padding", "documents", "all_padding"])
def test_packed_sequences_equal_dense(name: str, is_causal: bool) -> None:
    tensors = random_tensors(batch=3, tokens=N, key_heads=2, width=WIDTH)
    masks = masks_of(name)
    window = window_of(BAND, Scope(N, HEADS, is_causal=is_causal))
    segments = find_segments(3, N, **masks)
    results = packed_attention(*tensors, segments, window=window, scale=0.3, kernel=stand_in)
    dense = attention(BAND, backend="dense", scale=0.3, is_causal=is_causal, return_lse=True, **masks)(*tensors)
    for actual, wanted in zip(results, dense, strict=True):
        assert_same_maths(actual.double(), wanted, terms=N + WIDTH)


def test_gradients_reach_real_tokens_alone() -> None:
    leaves = [tensor.requires_grad_() for tensor in random_tensors(batch=3, tokens=N, key_heads=2, width=WIDTH)]
    masks = masks_of("padding")
    out, lse = packed_attention(*leaves, find_segments(3, N, **masks), window=(3, 3), scale=0.3, kernel=stand_in)
    wanted = attention(BAND, backend="dense", scale=0.3, **masks)(*leaves)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = (torch.autograd.grad((result * weight).sum(), leaves, retain_graph=True) for result in (out, wanted))
    for actual, oracle in zip(*gradients, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)
    with pytest.raises(ValueError, match="no gradient of the logsumexp; pass backend='flex'"):
        torch.autograd.grad(lse[lse.isfinite()].sum(), leaves)


@pytest.mark.parametrize(
    ("pattern", "is_causal", "wanted"),
    [
        (BAND, False, (3, 3)),
        (BAND, True, (3, 0)),
        (hf_sparse.pattern("strided", stride=1), False, (-1, -1)),
        (hf_sparse.pattern("strided", stride=1), True, (-1, 0)),
        (hf_sparse.pattern("longformer", window=4), True, (2, 0)),
    ],
)
def test_a_plain_window_is_found(pattern: Pattern, is_causal: bool, wanted: tuple[int, int]) -> None:
    assert window_of(pattern, Scope(N, HEADS, is_causal=is_causal)) == wanted


@pytest.mark.parametrize(
    "pattern",
    [
        hf_sparse.pattern("dilated", radius=2),
        hf_sparse.pattern("block_local"),
        hf_sparse.pattern("longformer", global_tokens=(0,)),
        hf_sparse.pattern("longformer", dilation=(1, 1, 2, 2)),
        BAND | hf_sparse.pattern("band", radius=1),
        hf_sparse.by_head({range(4): BAND}),
    ],
    ids=str,
)
def test_any_other_pattern_is_refused(pattern: Pattern) -> None:
    with pytest.raises(ValueError, match="which is not one plain window; pass backend='flex' or 'gather'"):
        window_of(pattern, Scope(N, HEADS))


def test_holes_are_refused() -> None:
    real = torch.ones(1, N, dtype=torch.bool)
    real[0, 5] = False
    segments = find_segments(1, N, key_padding_mask=real)
    with pytest.raises(ValueError, match="a key_padding_mask with holes between real tokens"):
        packed_attention(*random_tensors(tokens=N), segments, window=(3, 3), scale=1.0, kernel=stand_in)


def test_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="backend 'varlen' does not serve device cpu; pass backend='flex' or 'gather'"):
        attention(BAND, backend="varlen")(*random_tensors(tokens=N))
