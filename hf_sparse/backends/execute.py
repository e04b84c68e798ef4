"""Runs the tiles of a plan, forward and backward, on one sequence or on rows of a batch that share the plan."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.backends.kernels import Kernel
from hf_sparse.tiles import Gather, Group, Mask, Plan, Run, Tile

# elements of a tensor that one kernel call may take or hold: what is larger runs one head at a time, so that a head's keys
# and results stay in the cache
CALL_ELEMENTS = 1 << 20

# a negative exponent of this size is 0 in every float type
HUGE = 1e30

Words = tuple[Tensor, Tensor]


def run_forward(
    plan: Plan, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, words: Words | None, out: Tensor, lse: Tensor
) -> None:
    """Run a plan forward.

    Args:
        plan: what to run.
        kernel: what runs a tile.
        q: float ``[B, H, T, D]``.
        k: float ``[B, G, S, D]``.
        v: float ``[B, G, S, Dv]``.
        words: of the dropout, int32 ``[B, H, T]`` and ``[S]``; None without it.
        out: zeros ``[B, H, T, Dv]``, to be written.
        lse: -inf ``[B, H, T]``, to be written.
    """
    for group in plan.groups:
        for work in group.work:
            for lane in _lanes(work, group, kernel, q, k):
                part = kernel.forward(
                    _queries(work, lane, q),
                    _keys(work, lane, k),
                    _keys(work, lane, v),
                    lane.mask(work.mask),
                    _words(work, lane, words),
                )
                at_out, at_lse = _queries(work, lane, out), _queries(work, lane, lse)
                _merge(at_out, at_lse, *part, is_first=work.is_first)
                _write(work, lane, out, at_out)
                _write(work, lane, lse, at_lse)
        if len(group.invalid):
            for head in group.heads:
                out[:, head, group.invalid], lse[:, head, group.invalid] = 0.0, float("-inf")


def run_backward(
    plan: Plan,
    kernel: Kernel,
    inputs: tuple[Tensor, Tensor, Tensor],
    words: Words | None,
    held: tuple[Tensor, Tensor, Tensor, Tensor | None],
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Run a plan backward.

    Args:
        plan: what to run.
        kernel: what runs a tile.
        inputs: query, key and value, as for ``run_forward``.
        words: as for ``run_forward``.
        held: gradient of the output, output, logsumexp (``HUGE`` where a query reads nothing) and gradient of the logsumexp.
        sums: where the gradients of query, key and value are added.
    """
    q, k, v = inputs
    grad_out, out, lse, grad_lse = held
    for group in plan.groups:
        inner_lse = lse
        if len(group.rows):
            # what other tiles gave to the rows of global tokens was overwritten: it gets no gradient
            inner_lse = lse.index_fill(2, group.rows.to(lse.device), HUGE)
        for work in group.work:
            top = lse if isinstance(work, Tile) and work.is_row else inner_lse
            for lane in _lanes(work, group, kernel, q, k):
                dq, dk, dv = kernel.backward(
                    _queries(work, lane, grad_out),
                    _queries(work, lane, q),
                    _keys(work, lane, k),
                    _keys(work, lane, v),
                    lane.mask(work.mask),
                    _words(work, lane, words),
                    _queries(work, lane, out),
                    _queries(work, lane, top),
                    None if grad_lse is None else _queries(work, lane, grad_lse),
                )
                _write(work, lane, sums[0], _queries(work, lane, sums[0]).add_(dq))
                _add_keys(work, lane, sums[1], dk)
                _add_keys(work, lane, sums[2], dv)


@dataclass(frozen=True)
class _Lane:
    """Rows and heads that run together: one head of one row, or consecutive heads of all rows.

    Attributes:
        rows: rows of the batch.
        heads: query heads.
        key_heads: the key heads they read: a slice, or int64 indices, one for each query head.
        heads_in_group: the heads counted within their group; None means all of them.
    """

    rows: slice
    heads: slice
    key_heads: slice | Tensor
    heads_in_group: slice | None

    def mask(self, mask: Mask | None) -> Mask | None:
        """Return the mask of the lane's heads."""
        return mask if mask is None or self.heads_in_group is None else mask.of_heads(self.heads_in_group)


def _lanes(work: Tile | Run | Gather, group: Group, kernel: Kernel, q: Tensor, k: Tensor) -> Iterator[_Lane]:
    """Cut a tile's rows and heads into lanes."""
    ratio = q.shape[1] // k.shape[1]
    first, last = group.heads[0], group.heads[-1]
    if isinstance(work, Tile) and last - first + 1 == len(group.heads):
        tokens, keys = _length(work.q, q.shape[2]), _length(work.k, k.shape[2])
        per_lane = max(tokens, keys) * q.shape[3] if kernel.is_fused else tokens * keys
        if per_lane * len(group.heads) * q.shape[0] <= CALL_ELEMENTS:
            heads = slice(first, last + 1)
            index = torch.tensor([head // ratio for head in group.heads], device=k.device) if ratio > 1 else heads
            yield _Lane(slice(None), heads, index, None)
            return
    served = work.heads if isinstance(work, Gather) else range(len(group.heads))
    for row in range(q.shape[0]):
        for i in served:
            head = group.heads[i]
            yield _Lane(
                slice(row, row + 1), slice(head, head + 1), slice(head // ratio, head // ratio + 1), slice(i, i + 1)
            )


def _length(tokens: slice | Tensor, total: int) -> int:
    return len(range(*tokens.indices(total))) if isinstance(tokens, slice) else len(tokens)


def _queries(work: Tile | Run | Gather, lane: _Lane, tensor: Tensor) -> Tensor:
    """Return the queries of a tile ``[X, H, T, ...]``, as a view unless they are named by index."""
    held = tensor[lane.rows, lane.heads]
    if isinstance(work, Tile):
        return held[:, :, work.q]
    if isinstance(work, Gather):
        blocks, tokens = len(work.index), held[0, 0]
    else:
        blocks, tokens = work.blocks, held[0, 0, work.offset :: work.step]
    return tokens[work.first : work.first + blocks * work.block].unflatten(0, (blocks, work.block))[:, None]


def _write(work: Tile | Run | Gather, lane: _Lane, tensor: Tensor, queries: Tensor) -> None:
    """Put back what ``_queries`` had to copy."""
    if isinstance(work, Tile) and isinstance(work.q, Tensor):
        tensor[lane.rows, lane.heads][:, :, work.q] = queries


def _keys(work: Tile | Run | Gather, lane: _Lane, tensor: Tensor) -> Tensor:
    """Return the keys of a tile ``[X, H, S, D]``: a view, or a copy where they are named by index."""
    if isinstance(work, Tile):
        return tensor[lane.rows, :, work.k][:, lane.key_heads]
    return _blocks_of_keys(work, tensor[lane.rows, lane.key_heads][0, 0])[:, None]


def _blocks_of_keys(work: Run | Gather, tokens: Tensor) -> Tensor:
    """Return the keys of each block ``[blocks, S, ...]`` from all tokens of a lane ``[n, ...]``."""
    if isinstance(work, Gather):
        held = _units(work, tokens).index_select(0, work.index.flatten().to(tokens.device))
        return held.flatten(0, 1).unflatten(0, (len(work.index), -1))
    return _windows(work, tokens[work.offset :: work.step], 0, work.width)


def _units(work: Gather, tokens: Tensor) -> Tensor:
    """Return whole units of keys ``[units, unit, ...]``, as a view."""
    units = len(tokens) // work.unit
    return tokens[: units * work.unit].unflatten(0, (units, work.unit))


def _windows(work: Run, tokens: Tensor, skip: int, width: int) -> Tensor:
    first = work.first - work.back + skip
    windows = tokens[first : first + (work.blocks - 1) * work.block + width].unfold(0, width, work.block)
    return windows.movedim(-1, 1)


def _add_keys(work: Tile | Run | Gather, lane: _Lane, total: Tensor, grad: Tensor) -> None:
    """Add the gradient of a tile's keys ``[X, H, S, D]`` to the whole."""
    if isinstance(work, Tile):
        held = total[lane.rows, :, work.k]
        if isinstance(lane.key_heads, slice):
            held[:, lane.key_heads] += grad
        else:
            held.index_add_(1, lane.key_heads, grad)
        if isinstance(work.k, Tensor):
            total[lane.rows, :, work.k] = held
        return
    tokens = total[lane.rows, lane.key_heads][0, 0]
    if isinstance(work, Gather):
        units = grad[:, 0].flatten(0, 1).unflatten(0, (-1, work.unit))
        _units(work, tokens).index_add_(0, work.index.flatten().to(total.device), units)
        return
    tokens = tokens[work.offset :: work.step]
    for skip in range(0, work.width, work.block):
        # windows cut to one block do not overlap
        width = min(work.block, work.width - skip)
        _windows(work, tokens, skip, width).add_(grad[:, 0, skip : skip + width])


def _words(work: Tile | Run | Gather, lane: _Lane, words: Words | None) -> Words | None:
    """Return the words of a tile's queries ``[X, H, T]`` and keys, broadcastable to ``[X, H, S]``."""
    if words is None:
        return None
    of_keys = words[1][work.k] if isinstance(work, Tile) else _blocks_of_keys(work, words[1])[:, None]
    return _queries(work, lane, words[0]), of_keys


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, is_first: bool) -> None:
    """Add a tile to what other tiles gave the same queries, in place."""
    if is_first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out.mul_((lse - safe).exp_()[..., None]).addcmul_(part, (part_lse - safe).exp_()[..., None])
    lse.copy_(total)
