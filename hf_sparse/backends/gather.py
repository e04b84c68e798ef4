"""The ``gather`` backend: blocks of queries against the blocks they read, in plain torch, on any device.

Forward and backward are one custom operator each. Plans are built inside them from the pattern and from masks given as
tensors, so a compiled model sees two opaque calls and does not recompile when lengths, padding or global tokens change.
Half precision is computed in float32. No tensor of N x N is made.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.backends.dropout import Words, draw_words
from hf_sparse.backends.execute import HUGE, run_backward, run_forward
from hf_sparse.backends.kernels import Kernel, without_autocast
from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import Pattern, pattern_from_json
from hf_sparse.plan import make_plan, make_positional_plan
from hf_sparse.segments import find_segments, logical_length
from hf_sparse.tiles import Plan


@torch.library.custom_op("hf_sparse::gather", mutates_args=())
@without_autocast
def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
    scale: float,
    dropout: float,
    head_offset: int,
    num_heads: int,
    rows: str,
) -> tuple[Tensor, Tensor]:
    """Run a pattern.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        global_mask: bool ``[B, S]``, True = a global token.
        document_ids: int ``[B, S]``.
        query_positions: int64 ``[B, T]``, logical; given together with ``key_positions`` when queries are not the keys.
        key_positions: int64 ``[B, S]``, logical.
        seed: int64 ``[1]``, of the dropout; None without dropout.
        pattern: JSON of the pattern.
        layer: index of the layer.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        dropout: probability of dropping an attention probability.
        head_offset: index of the first head held here.
        num_heads: heads of the whole layer.
        rows: "all" rows, "shared" ones or those of "own" projections; see ``make_plan``.

    Returns:
        Output ``[B, H, T, Dv]`` in the dtype of the query, and logsumexp ``[B, H, T]`` in float32 (float64 for float64).
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (_readable(t, exact) for t in (query, key, value))
    out = q.new_zeros(*query.shape[:3], value.shape[3])
    lse = q.new_full(query.shape[:3], float("-inf"))
    call = _Call(pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows)
    kernel, words = call.kernel(q, v, scale, dropout), call.words(q, k, seed)
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions)
    for batch, q_tokens, k_tokens, plan in call.plans(query, key, *masks):
        held = q[batch, :, q_tokens], k[batch, :, k_tokens], v[batch, :, k_tokens]
        drawn = None if words is None else (words.query[batch, :, q_tokens], words.key[k_tokens])
        run_forward(plan, kernel, *held, drawn, out[batch, :, q_tokens], lse[batch, :, q_tokens])
    return out.to(query.dtype), lse


@gather_attention.register_fake
def _(query, key, value, *_args):  # type: ignore[no-untyped-def]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("hf_sparse::gather_backward", mutates_args=())
@without_autocast
def _gather_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
    scale: float,
    dropout: float,
    head_offset: int,
    num_heads: int,
    rows: str,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v, g, o = (_readable(t, exact) for t in (query, key, value, grad_out, out))
    # a query that reads nothing has no gradient
    top = lse.masked_fill(lse == float("-inf"), HUGE)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    call = _Call(pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows)
    kernel, words = call.kernel(q, v, scale, dropout, has_grad_lse=grad_lse is not None), call.words(q, k, seed)
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions)
    for batch, q_tokens, k_tokens, plan in call.plans(query, key, *masks):
        inputs = q[batch, :, q_tokens], k[batch, :, k_tokens], v[batch, :, k_tokens]
        drawn = None if words is None else (words.query[batch, :, q_tokens], words.key[k_tokens])
        held = g[batch, :, q_tokens], o[batch, :, q_tokens], top[batch, :, q_tokens]
        held_lse = None if grad_lse is None else grad_lse[batch, :, q_tokens]
        sums = grads[0][batch, :, q_tokens], grads[1][batch, :, k_tokens], grads[2][batch, :, k_tokens]
        run_backward(plan, kernel, inputs, drawn, (*held, held_lse), sums)
    dq, dk, dv = (grad.to(query.dtype) for grad in grads)
    return dq, dk, dv


@_gather_backward.register_fake
def _(_grad_out, _grad_lse, query, key, value, *_args):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])
    ctx.settings = inputs[9:]


def _autograd_backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, *masks = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _gather_backward(grad_out, grad_lse, query, key, value, out, lse, *masks, *ctx.settings)
    return (*grads, *[None] * (6 + len(ctx.settings)))


gather_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


@functools.lru_cache(maxsize=64)
def cached_plan(
    pattern: Pattern, scope: Scope, global_positions: tuple[int, ...] | None, invalid: tuple[int, ...], rows: str
) -> Plan:
    """Return the plan of a pattern on one sequence; equal calls get the same object."""
    parts = with_global_positions(pattern.parts(scope), global_positions)
    return make_plan(parts, scope, invalid=invalid, rows=rows)


class _Call:
    """What stays the same over the sequences of one call."""

    def __init__(
        self, pattern: Pattern, layer: int, is_causal: bool, heads: int, head_offset: int, num_heads: int, rows: str
    ) -> None:
        self.pattern, self.is_causal, self.rows = pattern, is_causal, rows
        self.heads, self.head_offset, self.num_heads = heads, head_offset, num_heads
        self.layer = layer if pattern.varies_by_layer else 0

    def kernel(
        self, query: Tensor, value: Tensor, scale: float, dropout: float, *, has_grad_lse: bool = False
    ) -> Kernel:
        is_fused = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and not (dropout or has_grad_lse)
        return Kernel(scale, dropout, is_fused)

    def words(self, query: Tensor, key: Tensor, seed: Tensor | None) -> Words | None:
        return None if seed is None else draw_words(seed, *query.shape[:3], key.shape[2], query.device)

    def plans(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        global_mask: Tensor | None,
        document_ids: Tensor | None,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
    ) -> Iterator[tuple[slice, slice, slice, Plan]]:
        """Yield rows of the batch, their query and key tokens, and the plan that serves them."""
        batch, tokens = key.shape[0], key.shape[2]
        if query_positions is not None and key_positions is not None:
            for row in range(batch):
                positions = query_positions[row].cpu(), key_positions[row].cpu()
                real = torch.ones(tokens, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[row].cpu()
                held = None if global_mask is None else tuple(positions[1][global_mask[row].cpu()].tolist())
                length = logical_length(positions[1], real, reads_padding=self.pattern.reads_padding)
                scope = self._scope(length)
                parts = with_global_positions(self.pattern.parts(scope), held)
                plan = make_positional_plan(parts, scope, *positions, real, rows=self.rows)
                yield slice(row, row + 1), slice(None), slice(None), plan
            return
        segments = find_segments(
            batch,
            tokens,
            key_padding_mask=key_padding_mask,
            document_ids=document_ids,
            global_mask=global_mask,
            reads_padding=self.pattern.reads_padding,
        )
        first = 0
        while first < len(segments):
            # neighbouring rows that hold the same kind of sequence are run together
            segment, last = segments[first], first
            while last + 1 < len(segments) and segments[last + 1].is_like(segment, segments[last].row + 1):
                last += 1
            scope = self._scope(segment.stop - segment.start)
            plan = cached_plan(self.pattern, scope, segment.global_positions, segment.invalid, self.rows)
            at = slice(segment.start, segment.stop)
            yield slice(segment.row, segments[last].row + 1), at, at, plan
            first = last + 1

    def _scope(self, length: int) -> Scope:
        return Scope(length, self.heads, self.layer, self.is_causal, self.head_offset, self.num_heads)


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a dtype and with its last dimension dense, as the fused kernel needs it."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
