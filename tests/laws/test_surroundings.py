"""What stands around a call changes nothing: autocast, the default device and dtype, modes, positions that begin elsewhere."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import hf_sparse
from hf_sparse.backends.flex_blocks import cached_layout
from hf_sparse.backends.plans import PLANS
from hf_sparse.parts import Scope
from hf_sparse.patterns import parts_of
from hf_sparse.segments import Segment
from tests.support.softmax import random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")
N = 48
LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))
BIGBIRD = hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=1)


def tensors(n: int = N) -> list[Tensor]:
    return [tensor.float() for tensor in random_tensors(tokens=n, width=8)]


def owned(pattern: hf_sparse.Pattern, query: Tensor) -> tuple[nn.Module, Tensor]:
    """Return weights of a pattern that differ from 0, and hidden states."""
    heads, width = query.shape[1], query.shape[3]
    state = pattern.make_state(hidden_size=24, num_heads=heads, num_key_value_heads=heads, head_dim=width)
    assert state is not None
    torch.manual_seed(1)
    return state, torch.randn(query.shape[0], query.shape[2], 24)


@pytest.mark.parametrize("n", [48, 300])
def test_precision_under_autocast_does_not_depend_on_the_length(n: int) -> None:
    query, key, value = tensors(n)
    band = hf_sparse.pattern("band", radius=64)
    wanted = hf_sparse.sparse_attention(query, key, value, band)
    with torch.autocast("cpu", torch.bfloat16):
        found = hf_sparse.sparse_attention(query, key, value, band)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("backend", ["gather", "dense", "auto"])
@pytest.mark.parametrize(
    "pattern", [LONGFORMER, BIGBIRD, hf_sparse.pattern("reformer", chunk_length=8)], ids=lambda p: p.key
)
def test_the_default_device_and_dtype_change_nothing(pattern: hf_sparse.Pattern, backend: str) -> None:
    query, key, value = tensors()
    ids = torch.arange(N).expand(len(query), -1) // 20
    call = functools.partial(
        hf_sparse.sparse_attention, query, key, value, pattern, backend=backend, document_ids=ids, dropout=0.25
    )

    def said() -> Tensor:
        PLANS.clear()
        parts_of.cache_clear()
        torch.manual_seed(0)
        return call()

    wanted = said()
    # a device on which nothing can be read
    with torch.device("meta"):
        torch.manual_seed(0)
        seed = torch.get_rng_state()
        PLANS.clear()
        parts_of.cache_clear()
        torch.set_rng_state(seed)
        assert torch.equal(call(), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(said(), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_global_tokens_are_found_whatever_device_is_the_default(is_causal: bool) -> None:
    query, key, value = tensors()
    state, hidden = owned(LONGFORMER, query)
    given = {"state": state, "hidden_states": hidden, "is_causal": is_causal}
    wanted = hf_sparse.sparse_attention(query, key, value, LONGFORMER, **given)
    with torch.device("meta"):
        found = hf_sparse.sparse_attention(query, key, value, LONGFORMER, **given)
    assert torch.equal(found, wanted)


def test_nodes_behind_padding_are_found_whatever_device_is_the_default() -> None:
    pattern = hf_sparse.pattern("star")
    query, key, value = tensors(N + pattern.num_nodes(N))
    state, hidden = owned(pattern, query)
    real = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    real[0, 30:N] = False
    given = {"state": state, "hidden_states": hidden, "key_padding_mask": real, "dropout": 0.25}
    torch.manual_seed(0)
    wanted = hf_sparse.sparse_attention(query, key, value, pattern, **given)
    torch.manual_seed(0)
    with torch.device("meta"):
        found = hf_sparse.sparse_attention(query, key, value, pattern, **given)
    assert torch.equal(found, wanted)


def test_parts_that_are_made_where_tensors_are_fake_are_real() -> None:
    parts_of.cache_clear()
    with FakeTensorMode():
        hf_sparse.sparse_attention(*(torch.empty(1, 2, 40, 8) for _ in range(3)), BIGBIRD)
    query, key, value = (tensor[:1, :2, :40] for tensor in tensors())
    found = hf_sparse.sparse_attention(query, key, value, BIGBIRD)
    parts_of.cache_clear()
    PLANS.clear()
    assert torch.equal(found, hf_sparse.sparse_attention(query, key, value, BIGBIRD))


def test_blocks_that_were_laid_out_without_gradients_serve_training() -> None:
    with torch.inference_mode():
        layout = cached_layout(BIGBIRD, Scope(N, 2), (Segment(0, 0, N),), 1, 1, "all", torch.device("cpu"))
    assert layout.blocks
    assert not any(block.is_inference() for block in layout.blocks)


@pytest.mark.parametrize("shift", [0, 100])
def test_projections_of_global_tokens_go_by_positions(shift: int) -> None:
    query, key, value = tensors()
    state, hidden = owned(LONGFORMER, query)
    at = torch.arange(N).expand(len(query), -1) + shift
    call = functools.partial(
        hf_sparse.sparse_attention,
        *(query, key, value, LONGFORMER),
        state=state,
        hidden_states=hidden,
        key_positions=at,
    )
    torch.testing.assert_close(call(), call(backend="gather"))
    torch.testing.assert_close(call(query_positions=at), call(query_positions=at, backend="gather"))


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = tensors()
    batch, heads = query.shape[:2]
    state, hidden = owned(LONGFORMER, query)

    def refused(said: str, pattern: hf_sparse.Pattern = LONGFORMER, **given: Any) -> None:
        with pytest.raises(ValueError, match=said):
            hf_sparse.sparse_attention(query, key, value, pattern, **given)

    band = hf_sparse.pattern("band", radius=2)
    refused(rf"hidden_states must be .* {batch} rows and {N} tokens", state=state, hidden_states=hidden[:, :-3])
    refused("bias must be broadcastable", band, bias=torch.zeros(batch + 1, heads, N, N))
    refused(rf"sinks must have shape \[heads\] = \[{heads}\]", band, sinks=torch.zeros(heads + 1))
    union = hf_sparse.pattern("reformer") | LONGFORMER
    with pytest.raises(ValueError, match="are not read beside a content-based pattern; set global_projections=False"):
        union.make_state(hidden_size=8, num_heads=1, num_key_value_heads=1, head_dim=8)
    with pytest.raises(ValueError, match="makes 32774 labels; at most 32768 are served"):
        hf_sparse.pattern("etc", max_relative_distance=8192)


def test_a_query_that_reads_nothing_has_no_share_of_the_sinks() -> None:
    query, key, value = tensors()
    real = torch.ones(query.shape[0], N, dtype=torch.bool)
    real[0, 30:] = False
    for sink in (float("-inf"), 1.5):
        out, lse = hf_sparse.sparse_attention(
            *(query, key, value, hf_sparse.pattern("band", radius=2)),
            key_padding_mask=real,
            sinks=torch.full((query.shape[1],), sink),
            return_lse=True,
        )
        assert out[0, :, 30:].abs().max() == 0
        assert (lse[0, :, 30:] == float("-inf")).all()
        assert out[:, :, :30].isfinite().all()


def test_heads_that_no_part_names_have_no_global_rows() -> None:
    query, key, value = (tensor[:, :1].expand(-1, 4, -1, -1) for tensor in tensors())
    narrow = hf_sparse.pattern("band", radius=2)
    inner = hf_sparse.by_head({(0, 1): narrow, (2, 3): LONGFORMER})
    pattern = hf_sparse.by_head({(0, 1): inner, (2, 3): narrow})
    state, hidden = owned(pattern, query)
    call = functools.partial(hf_sparse.sparse_attention, query, key, value, pattern, state=state, hidden_states=hidden)
    torch.testing.assert_close(call(), call(backend="gather"))


def test_what_a_mask_says_of_lsg_nodes_is_not_read() -> None:
    pattern = hf_sparse.pattern("lsg", block_size=8, sparse_block_size=4, sparsity_factor=2, num_global_tokens=2)
    query, key, value = (tensor.expand(2, -1, -1, -1) for tensor in tensors())
    real = torch.ones(2, N, dtype=torch.bool)
    real[0, 20:-2] = False
    call = functools.partial(hf_sparse.sparse_attention, query, key, value, pattern)
    wanted = call(key_padding_mask=real)
    told = real.clone()
    told[:, -2:] = False
    assert torch.equal(call(key_padding_mask=told), wanted)
    # a row of padding alone
    real[1, :-2] = False
    found = call(key_padding_mask=real)
    assert found.isfinite().all()
    torch.testing.assert_close(found[0], wanted[0])


def test_a_second_derivative_of_slots_says_that_there_is_none() -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    out = hf_sparse.sparse_attention(query, key, value, hf_sparse.pattern("reformer", chunk_length=8))
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
