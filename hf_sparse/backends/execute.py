"""Runs the tiles of a plan, forward and backward, on one sequence or on rows of a batch that share the plan."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.backends.kernels import LOG2_E, Kernel, Scratch
from hf_sparse.backends.labels import Distances, Labels
from hf_sparse.backends.lanes import Head, Sheet, Words
from hf_sparse.tiles import Gather, Group, Plan, Run, Tile, Work, count

# scores of one kernel call: enough to keep every core busy, few enough to stay near it
CALL_SCORES = 1 << 20

# a negative exponent of this size is 0 in every float type
HUGE = 1e30


def run_forward(
    plan: Plan,
    kernel: Kernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    words: Words | None,
    labels: Labels | Distances | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Run a plan forward.

    Args:
        plan: what to run.
        kernel: what runs a tile.
        q: float ``[B, H, T, D]``.
        k: float ``[B, G, S, D]``.
        v: float ``[B, G, S, Dv]``.
        words: of the dropout, int32 ``[B, H, T]`` and ``[S]``; None without it.
        labels: what is added to the scores; None without it.
        out: zeros ``[B, H, T, Dv]``, to be written.
        lse: -inf ``[B, H, T]``, to be written.
    """
    for group in plan.groups:
        for lane, works in _schedule(group, kernel.scratch, q, k):
            query = lane.queries(q, "query", kernel.query_factor)
            key, value = lane.keys(k, "key"), lane.keys(v, "value")
            drawn = None if words is None else (lane.queries(words[0]), words[1])
            for work in works:
                for piece in work.consecutive(CALL_SCORES) if isinstance(work, Run) else (work,):
                    term = lane.mask(piece.mask, q)
                    part, part_lse = kernel.forward(
                        lane.of_queries(piece, query),
                        lane.of_keys(piece, key),
                        lane.of_keys(piece, value),
                        term if labels is None else labels.term(lane, piece, term),
                        lane.words(piece, drawn),
                    )
                    lane.merge(piece, out, lse, part, part_lse)
        if len(group.invalid):
            for head in group.heads:
                out[:, head, group.invalid], lse[:, head, group.invalid] = 0.0, float("-inf")


def run_backward(
    plan: Plan,
    kernel: Kernel,
    inputs: tuple[Tensor, Tensor, Tensor],
    words: Words | None,
    labels: Labels | Distances | None,
    held: tuple[Tensor, Tensor, Tensor],
    sums: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Run a plan backward.

    Args:
        plan: what to run.
        kernel: what runs a tile.
        inputs: query, key and value, as for ``run_forward``.
        words: as for ``run_forward``.
        labels: as for ``run_forward``.
        held: gradient of the output, its sum of products with the output less the gradient of the logsumexp ``[B, H, T]``, and
            the logsumexp (``HUGE`` where a query reads nothing).
        sums: where the gradients of query, key, value and label scores (or bias by distance) are added.
    """
    q, k, v = inputs
    grad_out, delta, lse = held
    for group in plan.groups:
        inner_lse = lse
        if len(group.rows):
            # what other tiles gave to the rows of global tokens was overwritten: it gets no gradient
            inner_lse = lse.index_fill(2, group.rows.to(lse.device), HUGE)
        for lane, works in _schedule(group, kernel.scratch, q, k):
            query = lane.queries(q, "query", kernel.query_factor)
            grad = lane.queries(grad_out, "grad", kernel.grad_factor)
            own_delta = lane.queries(delta)
            top = lane.queries(lse if isinstance(works[0], Tile) and works[0].is_row else inner_lse)
            key, value = lane.keys(k, "key"), lane.keys(v, "value")
            grad_key, grad_value = lane.open_sum(sums[1], "grad_key"), lane.open_sum(sums[2], "grad_value")
            drawn = None if words is None else (lane.queries(words[0]), words[1])
            for work in works:
                for piece in work.apart(CALL_SCORES) if isinstance(work, Run) else (work,):
                    queries, keys, grads = (
                        lane.of_queries(piece, query),
                        lane.of_keys(piece, key),
                        lane.of_queries(piece, grad),
                    )
                    term = lane.mask(piece.mask, q)
                    grad_scores, weights = kernel.backward(
                        grads,
                        queries,
                        keys,
                        lane.of_keys(piece, value),
                        term if labels is None else labels.term(lane, piece, term),
                        lane.words(piece, drawn),
                        lane.of_queries(piece, own_delta),
                        lane.of_queries(piece, top),
                    )
                    if labels is not None:
                        labels.add_gradient(lane, piece, sums[3], grad_scores)
                    kernel.uncap_(grad_scores)
                    lane.add_to_queries(piece, sums[0], grad_scores, keys, kernel.scale)
                    lane.add_to_keys(piece, grad_key, grad_scores, queries, 1 / LOG2_E)
                    lane.add_to_keys(piece, grad_value, weights, grads, 1.0)
            lane.close_sum(sums[1], grad_key)
            lane.close_sum(sums[2], grad_value)


def inner_products(one: Tensor, other: Tensor) -> Tensor:
    """Return the sums ``[B, H, T]`` of products over the last dimension of two tensors ``[B, H, T, D]``."""
    batch, heads, _, width = one.shape
    tokens = max(1, CALL_SCORES // max(batch * heads * width, 1))
    # slice by slice: their layouts may differ, and of one head alone few tokens lie in a page of memory
    parts = [(x * y).sum(-1) for x, y in zip(one.split(tokens, 2), other.split(tokens, 2), strict=True)]
    return torch.cat(parts, 2)


def _schedule(group: Group, scratch: Scratch, q: Tensor, k: Tensor) -> Iterator[tuple[Head | Sheet, list[Work]]]:
    """Yield lanes and what they run, in an order that keeps the order of the work for each query.

    Tiles run for many heads at once. What lies between them runs head by head, so that a head's keys stay in the cache.
    """
    waiting: list[Work] = []
    for work in group.work:
        if isinstance(work, Tile):
            yield from _heads(waiting, group, scratch, q, k)
            waiting = []
            for rows, heads, first in _sheets(work, group, q, k):
                yield Sheet(work, rows, heads, first, q.shape[1] // k.shape[1], scratch), [work]
        else:
            waiting.append(work)
    yield from _heads(waiting, group, scratch, q, k)


def _heads(
    works: list[Work], group: Group, scratch: Scratch, q: Tensor, k: Tensor
) -> Iterator[tuple[Head, list[Work]]]:
    ratio = q.shape[1] // k.shape[1]
    for i, head in enumerate(group.heads):
        own = [work for work in works if not isinstance(work, Gather) or i in work.heads]
        for row in range(q.shape[0] if own else 0):
            yield Head(row, head, head // ratio, scratch), own


def _sheets(work: Tile, group: Group, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Yield rows and consecutive heads that a tile runs for at once, and the place of the first head in its group."""
    batch, tokens, keys = q.shape[0], count(work.q, q.shape[2]), count(work.k, k.shape[2])
    fitting = max(1, CALL_SCORES // max(tokens * keys, 1))
    # rows together may have to be copied
    copied = max(1, CALL_SCORES // max(tokens * q.shape[3], keys * q.shape[3], 1))
    first = 0
    while first < len(group.heads):
        stop = first + 1
        while (
            stop < len(group.heads)
            and stop - first < fitting
            and group.heads[stop] == group.heads[first] + stop - first
        ):
            stop += 1
        rows = max(1, min(fitting, copied) // (stop - first))
        for row in range(0, batch, rows):
            yield slice(row, min(row + rows, batch)), slice(group.heads[first], group.heads[stop - 1] + 1), first
        first = stop
