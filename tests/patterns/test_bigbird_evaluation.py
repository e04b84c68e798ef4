"""BigBird as the in-tree model computes it in evaluation: in the place of random blocks the first, which so counts often."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse

BLOCK, RANDOM, HEADS = 4, 3, 2
PATTERN = hf_sparse.pattern(
    "bigbird", block_size=BLOCK, num_random_blocks=RANDOM, length="padded", random_plan="evaluation"
)


def repeated(query: Tensor, key: Tensor, value: Tensor, real: Tensor, *, scale: float) -> Tensor:
    """Return the output in float64: the keys of the first block stand there anew for each random block."""
    n = query.shape[2]
    blocks = -(-n // BLOCK)
    q, k = torch.arange(n)[:, None] // BLOCK, torch.arange(n)[None] // BLOCK
    is_end = (q == 0) | (q == blocks - 1)
    seen = is_end | ((q - k).abs() <= 1) | (k == 0) | (k == blocks - 1)
    first = torch.arange(min(BLOCK, n)).repeat(RANDOM)
    again = (~is_end).expand(n, len(first))
    keys, values = (torch.cat([t, t[:, :, first]], 2).double() for t in (key, value))
    allowed = torch.cat([seen, again], 1)[None] & torch.cat([real, real[:, first]], 1)[:, None]
    scores = (scale * query.double() @ keys.transpose(2, 3)).masked_fill(~allowed[:, None], float("-inf"))
    return scores.softmax(-1) @ values


def inputs(n: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values that ask for gradients, and a mask whose last row is padded."""
    generator = torch.Generator().manual_seed(n)
    held = [torch.randn(2, HEADS, n, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    real = torch.ones(2, n, dtype=torch.bool)
    real[1, max(1, n - n // 4) :] = False
    return [tensor.requires_grad_() for tensor in held], real


@pytest.mark.parametrize("backend", ["auto", "gather", "dense"])
@pytest.mark.parametrize("n", [1, 3, 4, 8, 9, 30, 64])
def test_it_is_attention_whose_first_block_stands_there_again(n: int, backend: str) -> None:
    held, real = inputs(n)
    weights = (
        torch.linspace(-1, 1, 2 * HEADS * n * 8, dtype=torch.float64).view(2, HEADS, n, 8) * real[:, None, :, None]
    )
    got = hf_sparse.sparse_attention(*held, PATTERN, key_padding_mask=real, scale=0.4, backend=backend)
    want = repeated(*held, real, scale=0.4)
    assert got.dtype == torch.float64
    assert ((got - want) * real[:, None, :, None]).abs().max() < 1e-12
    own, other = (torch.autograd.grad((out * weights).sum(), held) for out in (got, want))
    for mine, theirs in zip(own, other, strict=True):
        assert (mine - theirs).abs().max() < 1e-12


def test_what_is_counted_again_weighs_more() -> None:
    held, real = inputs(64)
    plain = hf_sparse.pattern("bigbird", block_size=BLOCK, num_random_blocks=0, length="padded")
    got = hf_sparse.sparse_attention(*held, PATTERN, key_padding_mask=real)
    once = hf_sparse.sparse_attention(*held, plain, key_padding_mask=real)
    assert (got - once)[:, :, BLOCK:-BLOCK].abs().max() > 0.01
    # the rows of the end blocks read everything once
    ends = (got - once)[:, :, [0, 1, 2, 3, 60, 61, 62, 63]]
    assert ends.abs().max() < 1e-12


@pytest.mark.parametrize("n", [8, 16])
def test_half_precision_where_every_pair_is_read(n: int) -> None:
    held, _ = inputs(n, torch.bfloat16)
    # the first block counts again all the same
    assert PATTERN.mask(n)[0].all()
    out = hf_sparse.sparse_attention(*held, PATTERN)
    want = repeated(*held, torch.ones(2, n, dtype=torch.bool), scale=8**-0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=2**-7, rtol=2**-7)


def test_half_precision_and_the_logsumexp() -> None:
    held, real = inputs(64, torch.bfloat16)
    out, lse = hf_sparse.sparse_attention(*held, PATTERN, key_padding_mask=real, return_lse=True)
    want = repeated(*held, real, scale=1 / math.sqrt(8))
    assert out.dtype == torch.bfloat16
    assert lse.shape == (2, HEADS, 64)
    # scores of half precision would be off by some hundredths: columns of logarithms are added in float32
    assert ((out - want) * real[:, None, :, None]).abs().max() < 0.02


def test_the_pattern_draws_no_random_block() -> None:
    plain = hf_sparse.pattern("bigbird", block_size=BLOCK, num_random_blocks=0, length="padded")
    assert torch.equal(PATTERN.mask(70, heads=2), plain.mask(70, heads=2))
    assert PATTERN.density(70) == plain.density(70)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"is_causal": True}, "causal attention"),
        ({"document_ids": torch.zeros(2, 16, dtype=torch.int64)}, "document_ids"),
        ({"softcap": 5.0}, "softcap"),
        ({"scale": 0.0}, "a scale of 0"),
    ],
)
def test_calls_that_it_cannot_serve_are_refused(call: dict[str, Any], said: str) -> None:
    held, _ = inputs(16, torch.float32)
    with pytest.raises(ValueError, match=f"'bigbird' counts some keys more than once and does not serve {said}"):
        hf_sparse.sparse_attention(*held, PATTERN, **call)


@pytest.mark.parametrize("fields", [{"length": "real"}, {"length": "padded", "num_external_global": 2}])
def test_it_is_for_the_padded_length_and_without_nodes(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="set length='padded' and num_external_global=0"):
        hf_sparse.pattern("bigbird", random_plan="evaluation", **fields)


def test_it_cannot_be_combined_with_others() -> None:
    other = hf_sparse.pattern("bigbird", block_size=BLOCK, length="padded")
    for make in (lambda: PATTERN | other, lambda: hf_sparse.by_head({0: other, 1: PATTERN})):
        with pytest.raises(ValueError, match="counts some keys more than once cannot be combined with others"):
            make()
