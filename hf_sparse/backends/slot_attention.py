"""Attention over slots: blocks of queries against keys named by index, put back and merged, head by head.

A query may stand in several blocks. Its outputs merge by logsumexp, so that all its keys share one softmax; the backward of
each block is then exact when it is given the merged output and logsumexp. Nothing is kept for the backward pass but these and
the slots.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hf_sparse.backends.kernels import LOG2_E, without_autocast
from hf_sparse.backends.slot_calls import SlotCall

_HUGE = 1e30


def slot_attention(query: Tensor, key: Tensor, value: Tensor, call: SlotCall) -> tuple[Tensor, Tensor]:
    """Attend, differentiably.

    Args:
        query: float ``[B, H, N, D]``.
        key: float ``[B, G, S, D]``; of tokens, and behind them what is no token.
        value: float ``[B, G, S, Dv]``.
        call: who reads whom and how.

    Returns:
        Output ``[B, H, N, Dv]`` and logsumexp ``[B, H, N]``, both in float32 (float64 for float64); 0 and -inf for a query that
        reads nothing. Of means there is no common logsumexp: it tells only who reads anything, and has no gradient.
    """
    found: tuple[Tensor, Tensor] = _SlotAttention.apply(query, key, value, call)
    return found


class _SlotAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, call: SlotCall) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, call)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.call = call
        ctx.set_materialize_grads(False)
        if call.assignment.is_mean:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*_backward(ctx.call, *grads, *ctx.saved_tensors), None)


@without_autocast
def _forward(query: Tensor, key: Tensor, value: Tensor, call: SlotCall) -> tuple[Tensor, Tensor]:
    q, k, v = _exact(query, key, value)
    batch, heads, tokens = q.shape[:3]
    out, lse = q.new_empty(batch, heads, tokens, v.shape[3]), q.new_empty(batch, heads, tokens)
    parts, sums = _Rows(q, v.shape[3]), _Rows(q, 1)
    merge = _mean if call.assignment.is_mean else _merged
    for lane, row, head, group in _lanes(q, k):
        own = q[row, head] * call.kernel.query_factor, k[row, group], v[row, group]
        places = []
        for queries, keys, allowed in call.pieces(lane):
            held = _tensors(own, queries, keys)
            part, part_lse = call.kernel.forward(*held, _term(allowed, q), _words(call, row, head, queries, keys))
            places.append(queries.flatten())
            parts.room(*queries.shape).copy_(part)
            sums.room(*queries.shape).copy_(part_lse[..., None])
        if places:
            out[row, head], lse[row, head] = merge(torch.cat(places), parts.take(), sums.take()[:, 0], tokens)
        else:
            out[row, head], lse[row, head] = 0.0, float("-inf")
    return out, lse


def _backward(
    call: SlotCall,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = _exact(query, key, value)
        g = torch.zeros_like(out) if grad_out is None else grad_out.to(out.dtype)
        delta = (g * out).sum(-1)
        if grad_lse is not None and not call.assignment.is_mean:
            delta = delta - grad_lse
        top = lse.masked_fill(lse == float("-inf"), _HUGE)
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        q_rows, k_rows, v_rows = (_Rows(t, t.shape[3]) for t in (q, k, v))
        for lane, row, head, group in _lanes(q, k):
            own = q[row, head] * call.kernel.query_factor, k[row, group], v[row, group]
            share = _share(call, lane, own, row, head, g.shape[2]) if call.assignment.is_mean else None
            q_at, k_at = [], []
            for queries, keys, allowed in call.pieces(lane):
                held, words = _tensors(own, queries, keys), _words(call, row, head, queries, keys)
                term, at = _term(allowed, q), queries.clamp(min=0)
                grad = _rows(g[row, head], queries) * call.kernel.grad_factor
                own_delta, own_top = delta[row, head][at], top[row, head][at]
                if share is not None:
                    # each block has a softmax of its own
                    part, part_lse = call.kernel.forward(*held, term, words)
                    grad = grad * share[at][..., None]
                    own_delta = (grad * part).sum(-1) / call.kernel.grad_factor
                    own_top = part_lse.masked_fill(part_lse == float("-inf"), _HUGE)
                scores, weights = call.kernel.backward(grad, *held, term, words, own_delta, own_top)
                q_at.append(queries.flatten())
                k_at.append(keys.flatten())
                torch.bmm(scores, held[1], out=q_rows.room(*queries.shape))
                torch.bmm(scores.transpose(1, 2), held[0], out=k_rows.room(*keys.shape))
                torch.bmm(weights.transpose(1, 2), grad, out=v_rows.room(*keys.shape))
            if q_at:
                dq[row, head] = _Sums(torch.cat(q_at), q.shape[2])(q_rows.take())
                sums = _Sums(torch.cat(k_at), k.shape[2])
                dk[row, group] += sums(k_rows.take())
                dv[row, group] += sums(v_rows.take())
        dq.mul_(call.scale)
        dk.div_(LOG2_E)
        return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


def _share(call: SlotCall, lane: int, own: tuple[Tensor, Tensor, Tensor], row: int, head: int, tokens: int) -> Tensor:
    """Return one over the number of blocks in which each query reads something."""
    count = own[0].new_zeros(tokens)
    for queries, _, allowed in call.pieces(lane):
        reads = queries >= 0 if allowed is None else allowed.any(2) & (queries >= 0)
        count.index_add_(0, queries[reads], torch.ones_like(queries[reads], dtype=count.dtype))
    return 1 / count.clamp(min=1)


def _merged(at: Tensor, part: Tensor, part_lse: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Merge outputs ``[X, Dv]`` at places ``[X]`` by logsumexp; those at -1 are dropped."""
    sums = _Sums(at, tokens)
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
    sums = _Sums(at, tokens)
    reads = (part_lse > float("-inf")).to(part.dtype)[:, None]
    count = sums(reads)
    lse = torch.zeros_like(count).masked_fill(count == 0, float("-inf"))
    return sums(reads * part) / count.clamp(min=1), lse[:, 0]


class _Rows:
    """Rows collected piece by piece, lane after lane in the same memory: asked for anew it would cost as much as the work.

    Args:
        like: of what dtype and where.
        width: of a row.
    """

    def __init__(self, like: Tensor, width: int) -> None:
        self._held, self._count = like.new_empty(0, width), 0

    def room(self, blocks: int, size: int) -> Tensor:
        """Return room for more rows, ``[blocks, size, width]``."""
        first, last = self._count, self._count + blocks * size
        if last > len(self._held):
            more = self._held.new_empty(2 * last, self._held.shape[1])
            more[:first] = self._held[:first]
            self._held = more
        self._count = last
        return self._held[first:last].view(blocks, size, -1)

    def take(self) -> Tensor:
        """Return the rows ``[Y, width]``, good until the next ``room``, and begin anew."""
        last, self._count = self._count, 0
        return self._held[:last]


class _Sums:
    """Sums of rows that stand at the same place; gathers, which are many times as fast as adding where they stand.

    Args:
        at: int64 ``[X]``, the place of each row; -1 drops it.
        tokens: places.
    """

    def __init__(self, at: Tensor, tokens: int) -> None:
        self._at, self._tokens = at.masked_fill(at < 0, tokens), tokens
        counts = torch.bincount(self._at, minlength=tokens + 1)[:tokens]
        most = int(counts.max())
        self.is_single = most <= 1
        # a place with many more rows than others would make the table long
        self._table: Tensor | None = None
        if self.is_single or most * tokens <= 4 * len(at):
            order = torch.argsort(self._at, stable=True)
            first, step = counts.cumsum(0) - counts, torch.arange(max(most, 1), device=at.device)[:, None]
            listed = order[(first + step).clamp(max=max(len(at) - 1, 0))]
            self._table = listed.masked_fill(step >= counts, len(at))

    def __call__(self, rows: Tensor, nothing: float = 0.0) -> Tensor:
        """Return ``[tokens, D]`` for rows ``[X, D]``; ``nothing`` where a place has no row, if none has several."""
        if self._table is None:
            return rows.new_zeros(self._tokens + 1, rows.shape[1]).index_add_(0, self._at, rows)[: self._tokens]
        rows = torch.cat([rows, rows.new_full((1, rows.shape[1]), nothing)])
        total = rows.index_select(0, self._table[0])
        for line in self._table[1:]:
            total += rows.index_select(0, line)
        return total


def _exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t if t.dtype == torch.float64 else t.float() for t in tensors)


def _lanes(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield lane, row, head and key head."""
    heads, ratio = q.shape[1], q.shape[1] // k.shape[1]
    for lane in range(q.shape[0] * heads):
        yield lane, lane // heads, lane % heads, lane % heads // ratio


def _tensors(own: tuple[Tensor, Tensor, Tensor], queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(own[0], queries), _rows(own[1], keys), _rows(own[2], keys)


def _rows(vectors: Tensor, at: Tensor) -> Tensor:
    """Return ``[X, T, D]`` for vectors ``[N, D]`` and places ``[X, T]``; any vector for -1."""
    return vectors.index_select(0, at.flatten().clamp(min=0)).view(*at.shape, -1)


def _term(allowed: Tensor | None, like: Tensor) -> Tensor | None:
    """Return 0 where a pair is an edge and -inf elsewhere; None where all are."""
    if allowed is None:
        return None
    term = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device).masked_fill_(~allowed, float("-inf"))
    # what all blocks have in common is held once
    return term[0] if len(term) == 1 else term


def _words(call: SlotCall, row: int, head: int, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
    if call.words is None:
        return None
    return call.words[0][row, head][queries.clamp(min=0)], call.words[1][keys.clamp(min=0)]
