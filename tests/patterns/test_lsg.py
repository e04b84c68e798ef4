"""LSG: local blocks, what is kept of the tokens beyond them, and global tokens, against loops in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests.support.lsg_rules import attended

SCALE, HEADS, WIDTH = 0.4, 4, 8
TYPES = ("none", "norm", "pooling", "stride", "block_stride")
SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "sparsity_type": kind} for kind in TYPES},
    "norm, small chunks": {"block_size": 8, "sparse_block_size": 4, "sparsity_factor": 2, "sparsity_type": "norm"},
    "norm, wide": {"block_size": 4, "sparse_block_size": 8, "sparsity_factor": 2, "sparsity_type": "norm"},
    "stride of four": {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 4, "sparsity_type": "stride"},
    "blocks of four": {"block_size": 8, "sparse_block_size": 8, "sparsity_factor": 4, "sparsity_type": "block_stride"},
    "all kept": {"block_size": 4, "sparse_block_size": 6, "sparsity_factor": 1, "sparsity_type": "norm"},
}
by_settings = pytest.mark.parametrize("name", SETTINGS)


def made(name: str, count: int = 2) -> hf_sparse.Pattern:
    return hf_sparse.pattern("lsg", **SETTINGS[name], num_global_tokens=count)


def tensors(n: int, count: int = 2, *, rows: int = 2) -> list[Tensor]:
    """Return queries, keys and values of tokens and, behind them, global tokens, which ask for gradients."""
    generator = torch.Generator().manual_seed(n)
    shape = (rows, HEADS, n + count, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


def oracle(held: list[Tensor], name: str, real: int, count: int = 2, row: int = 0) -> Tensor:
    """Return what the first ``real`` tokens and the global tokens of a row read, in our order."""
    n = held[0].shape[2] - count
    at = [*range(n, n + count), *range(real)]
    settings = {**SETTINGS[name], "num_global_tokens": count}
    out = attended(*(tensor[row][:, at] for tensor in held), settings, scale=SCALE)
    return torch.cat([out[:, count:], out[:, :count]], 1)


@by_settings
@pytest.mark.parametrize("n", [1, 3, 4, 8, 9, 12, 13, 33, 40])
def test_outputs_and_gradients_equal_the_loops(n: int, name: str) -> None:
    held = tensors(n, rows=1)
    got = hf_sparse.sparse_attention(*held, made(name), scale=SCALE)
    want = oracle(held, name, n)[None]
    assert (got - want).abs().max() < 1e-12
    weights = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    own, other = (torch.autograd.grad((out * weights).sum(), held, retain_graph=True) for out in (got, want))
    for mine, theirs in zip(own, other, strict=True):
        assert (mine - theirs).abs().max() < 1e-12


@by_settings
def test_padding_counts_for_nothing(name: str) -> None:
    held = tensors(37)
    is_real = torch.ones(2, 39, dtype=torch.bool)
    is_real[1, 22:37] = False
    got = hf_sparse.sparse_attention(*held, made(name), scale=SCALE, key_padding_mask=is_real)
    assert (got[0] - oracle(held, name, 37)).abs().max() < 1e-12
    want = oracle(held, name, 22, row=1)
    assert (got[1][:, [*range(22), 37, 38]] - want).abs().max() < 1e-12
    assert (got[1][:, 22:37] == 0).all()


@by_settings
def test_backends_agree(name: str) -> None:
    held = tensors(45)
    gather, dense = (
        hf_sparse.sparse_attention(*held, made(name), scale=SCALE, backend=backend) for backend in ("gather", "dense")
    )
    assert (gather - dense).abs().max() < 1e-12


def test_heads_that_begin_elsewhere_keep_their_own_tokens() -> None:
    for name in ("stride of four", "blocks of four"):
        held = tensors(60)
        whole = hf_sparse.sparse_attention(*held, made(name), scale=SCALE)
        part = hf_sparse.sparse_attention(
            *(tensor[:, 2:] for tensor in held), made(name), scale=SCALE, head_offset=2, num_heads=HEADS
        )
        assert (whole[:, 2:] - part).abs().max() < 1e-12


def test_what_is_kept_is_read() -> None:
    held = tensors(60)
    outputs = [hf_sparse.sparse_attention(*held, made(kind), scale=SCALE) for kind in TYPES]
    for i, one in enumerate(outputs):
        for other in outputs[:i]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.slow
def test_dropout_keeps_the_mean() -> None:
    held = [tensor.detach() for tensor in tensors(30, rows=1)]
    many = [tensor.expand(4000, -1, -1, -1) for tensor in held]
    torch.manual_seed(0)
    got = hf_sparse.sparse_attention(*many, made("norm"), scale=SCALE, dropout=0.3).mean(0)
    assert (got - oracle(held, "norm", 30)).abs().max() < 0.08


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity_factor": 3, "block_size": 4}, "sparsity_factor must divide block_size, got 3 and 4"),
        ({"block_size": 8, "sparse_block_size": 2}, "at least three quarters of the 4 tokens kept of a block, got 2"),
        ({"block_size": 8, "sparse_block_size": 6}, "under 'norm' whole chunks"),
        ({"sparsity_type": "lsh"}, "sparsity_type must be one of none, norm, pooling, stride, block_stride; got 'lsh'"),
        ({"num_global_tokens": 0}, "num_global_tokens must be at least 1, got 0"),
        ({"pool_with_global": 1}, "pool_with_global must be true or false"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        hf_sparse.pattern("lsg", **fields)


def test_causal_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="global tokens that read all, so it cannot be causal"):
        hf_sparse.sparse_attention(*tensors(20), made("norm"), is_causal=True)


def test_density_counts_at_most_what_is_read() -> None:
    pattern = hf_sparse.pattern("lsg", block_size=16, sparse_block_size=16, num_global_tokens=3)
    assert pattern.density(1000) == (48 + 32 + 6) / 1000
    assert pattern.density(20) == 1.0
