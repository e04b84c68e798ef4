"""Attention over slots: blocks of queries against keys named by index, put back and merged, head by head.

A query may stand in several blocks. Its outputs merge by logsumexp, so that all its keys share one softmax; the backward of
each block is then exact when it is given the merged output and logsumexp. Nothing is kept for the backward pass but these and
the slots.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_sparse.backends.execute import inner_products
from hf_sparse.backends.kernels import LOG2_E, Kernel, without_autocast
from hf_sparse.backends.slot_calls import SlotCall
from hf_sparse.backends.slot_rows import Rows, Sums, keys_of, rows_at
from hf_sparse.slots import Slots

_HUGE = 1e30


def slot_attention(
    query: Tensor, key: Tensor, value: Tensor, call: SlotCall, shares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attend, differentiably.

    Args:
        query: float ``[B, H, N, D]``.
        key: float ``[B, G, S, D]``; of tokens, and behind them what is no token.
        value: float ``[B, G, S, Dv]``.
        call: who reads whom and how.
        shares: float ``[B, H, places, blocks]``, by which the blocks of ``assignment.chosen`` tokens were chosen. They change
            nothing, and get the gradient of a mixture in the place of what was chosen (straight-through).

    Returns:
        Output ``[B, H, N, Dv]`` and logsumexp ``[B, H, N]``, both in float32 (float64 for float64); 0 and -inf for a query that
        reads nothing. Of means there is no common logsumexp: it tells only who reads anything, and has no gradient.
    """
    found: tuple[Tensor, Tensor] = _SlotAttention.apply(query, key, value, shares, call)
    return found


class _SlotAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shares: Tensor | None, call: SlotCall
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, call)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = call
        ctx.places = None if shares is None else shares.shape[2]
        ctx.set_materialize_grads(False)
        if call.assignment.is_mean:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        places = ctx.places if ctx.needs_input_grad[3] else None
        return (*_backward(ctx.call, places, *grads, *ctx.saved_tensors), None)


@without_autocast
def _forward(query: Tensor, key: Tensor, value: Tensor, call: SlotCall) -> tuple[Tensor, Tensor]:
    q, k, v = _exact(query, key, value)
    batch, heads, tokens = q.shape[:3]
    # laid out as transformers reads it
    out = q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, tokens)
    parts, sums = Rows(q, v.shape[3]), Rows(q, 1)
    merge = _mean if call.assignment.is_mean else _merged
    # not of the call, which the backward pass keeps: it has scratch of its own
    kernel = Kernel(call.scale, call.dropout)
    for lane, row, head, group in _lanes(q, k):
        own = _own(kernel, q, k, v, row, head, group)
        places = []
        for slots, blocks, pieces in call.rounds(lane):
            key_rows, value_rows = (keys_of(slots, blocks, vectors) for vectors in own[1:])
            for at, allowed in pieces:
                queries = slots.queries[at]
                held = rows_at(own[0], queries), key_rows.of(at), value_rows.of(at)
                room = parts.room(queries.numel()).view(*queries.shape, -1)
                _, part_lse = kernel.forward(*held, _term(allowed, q), _words(call, slots, at, row, head), room)
                places.append(queries.flatten())
                sums.room(queries.numel())[:, 0].copy_(part_lse.flatten())
        if places:
            out[row, head], lse[row, head] = merge(torch.cat(places), parts.take(), sums.take()[:, 0], tokens)
        else:
            out[row, head], lse[row, head] = 0.0, float("-inf")
    return out, lse


def _backward(
    call: SlotCall,
    places: int | None,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor | None, ...]:
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _exact(query, key, value)
        g = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype)
        delta = inner_products(g, out)
        if grad_lse is not None and not call.assignment.is_mean:
            delta = delta - grad_lse
        top = lse.masked_fill(lse == float("-inf"), _HUGE)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        q_rows, k_rows, v_rows = (Rows(t, t.shape[3]) for t in (q, k, v))
        of_shares: list[Tensor] = []
        kernel = Kernel(call.scale, call.dropout)
        for lane, row, head, group in _lanes(q, k):
            own = _own(kernel, q, k, v, row, head, group)
            own_grad = g[row, head] * kernel.grad_factor
            share = _share(call, lane, own, row, head, g.shape[2]) if call.assignment.is_mean else None
            q_at, k_at = [], []
            for slots, blocks, pieces in call.rounds(lane):
                keys, values = (keys_of(slots, blocks, vectors) for vectors in own[1:])
                k_at.append(keys.places)
                grad_keys, grad_values = keys.open_sum(k_rows), values.open_sum(v_rows)
                for at, allowed in pieces:
                    queries, words, term = slots.queries[at], _words(call, slots, at, row, head), _term(allowed, q)
                    held, named = (rows_at(own[0], queries), keys.of(at), values.of(at)), queries.clamp(min=0)
                    grad = rows_at(own_grad, queries)
                    own_delta, own_top = delta[row, head][named], top[row, head][named]
                    if share is not None:
                        # each block has a softmax of its own
                        part, part_lse = kernel.forward(*held, term, words)
                        grad = grad * share[named][..., None]
                        own_delta = (grad * part).sum(-1) / kernel.grad_factor
                        own_top = part_lse.masked_fill(part_lse == float("-inf"), _HUGE)
                    scores, weights = kernel.backward(grad, *held, term, words, own_delta, own_top)
                    q_at.append(queries.flatten())
                    torch.bmm(scores, held[1], out=q_rows.room(queries.numel()).view(*queries.shape, -1))
                    keys.add(grad_keys, at, scores, held[0])
                    values.add(grad_values, at, weights, grad)
            is_first = head % (q.shape[1] // k.shape[1]) == 0
            _write(dq[row, head], q_at, q_rows, call.scale, is_first=True)
            if places is not None:
                of_keys, of_values = (
                    _products(rows, vectors, places, call.assignment.chosen)
                    for rows, vectors in zip((k_rows, v_rows), own[1:], strict=True)
                )
                of_shares.append(of_keys / LOG2_E + of_values)
            _write(dk[row, group], k_at, k_rows, 1 / LOG2_E, is_first=is_first)
            _write(dv[row, group], k_at, v_rows, 1.0, is_first=is_first)
        shares = torch.stack(of_shares).unflatten(0, q.shape[:2]) if of_shares else None
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), shares


def _products(rows: Rows, vectors: Tensor, places: int, size: int) -> Tensor:
    """Return products ``[places, blocks]`` of gradients of what was chosen with the vectors ``[N, D]`` of all blocks."""
    width = vectors.shape[1]
    chosen = rows.held.view(places, -1, width)[:, :size].flatten(1)
    missing = -len(vectors) % size
    blocks = torch.nn.functional.pad(vectors, (0, 0, 0, missing)) if missing else vectors
    return chosen @ blocks.view(-1, size * width).T


def _own(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, row: int, head: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a lane's queries, multiplied, keys and values: dense, as rows far apart are slow to pick."""
    return q[row, head] * kernel.query_factor, k[row, group].contiguous(), v[row, group].contiguous()


def _write(total: Tensor, at: list[Tensor], rows: Rows, factor: float, *, is_first: bool) -> None:
    """Write a factor times the sums of rows at their places; add them if they are not the first there."""
    if not at:
        if is_first:
            total.zero_()
        return
    sums = Sums(torch.cat(at), len(total))(rows.take())
    if is_first:
        torch.mul(sums, factor, out=total)
    else:
        total.add_(sums, alpha=factor)


def _share(call: SlotCall, lane: int, own: tuple[Tensor, Tensor, Tensor], row: int, head: int, tokens: int) -> Tensor:
    """Return one over the number of blocks in which each query reads something."""
    count = own[0].new_zeros(tokens)
    for queries, _, allowed in call.pieces(lane):
        reads = queries >= 0 if allowed is None else allowed.any(2) & (queries >= 0)
        count.index_add_(0, queries[reads], torch.ones_like(queries[reads], dtype=count.dtype))
    return 1 / count.clamp(min=1)


def _merged(at: Tensor, part: Tensor, part_lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Merge outputs ``[X, Dv]`` at places ``[X]`` by logsumexp; those at -1 are dropped."""
    sums = Sums(at, tokens)
    if sums.is_single:
        return sums(part), sums(part_lse[:, None], float("-inf"))[:, 0]
    at = at.masked_fill(at < 0, tokens)
    top = part_lse.new_full((tokens + 1,), float("-inf")).scatter_reduce(0, at, part_lse, "amax")
    is_empty = top == float("-inf")
    weight = (part_lse - top.masked_fill(is_empty, 0.0)[at]).exp()
    total = sums(weight[:, None])[:, 0].masked_fill(is_empty[:tokens], 1.0)
    out = sums(weight[:, None] * part) / total[:, None]
    return out, top[:tokens] + total.log()


def _mean(at: Tensor, part: Tensor, part_lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Average outputs of blocks in which a query reads something; the logsumexp is 0 there, else -inf."""
    sums = Sums(at, tokens)
    reads = (part_lse > float("-inf")).to(part.dtype)[:, None]
    count = sums(reads)
    lse = torch.zeros_like(count).masked_fill(count == 0, float("-inf"))
    return sums(reads * part) / count.clamp(min=1), lse[:, 0]


def _exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def _lanes(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield lane, row, head and key head."""
    heads, ratio = q.shape[1], q.shape[1] // k.shape[1]
    for lane in range(q.shape[0] * heads):
        yield lane, lane // heads, lane % heads, lane % heads // ratio


def _term(allowed: Tensor | None, like: Tensor) -> Tensor | None:
    """Return 0 where a pair is an edge and -inf elsewhere; None where all are."""
    if allowed is None:
        return None
    term = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))
    # what all blocks have in common is held once
    return term[0] if len(term) == 1 else term


def _words(call: SlotCall, slots: Slots, at: slice, row: int, head: int) -> tuple[Tensor, Tensor] | None:
    if call.words is None:
        return None
    queries, keys = slots.queries[at].clamp(min=0), slots.keys[at].clamp(min=0)
    return call.words[0][row, head][queries], call.words[1][keys]
