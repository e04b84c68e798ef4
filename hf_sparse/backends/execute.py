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
        for lane, works in _schedule(group, kernel, q, k):
            keys, values = _Keys(lane, works, k), _Keys(lane, works, v)
            for work in works:
                part = kernel.forward(
                    _queries(work, lane, q),
                    keys.of(work),
                    values.of(work),
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
        for lane, works in _schedule(group, kernel, q, k):
            keys, values = _Keys(lane, works, k), _Keys(lane, works, v)
            grad_keys, grad_values = _Keys(lane, works, sums[1], is_sum=True), _Keys(lane, works, sums[2], is_sum=True)
            for work in works:
                top = lse if isinstance(work, Tile) and work.is_row else inner_lse
                dq, dk, dv = kernel.backward(
                    _queries(work, lane, grad_out),
                    _queries(work, lane, q),
                    keys.of(work),
                    values.of(work),
                    lane.mask(work.mask),
                    _words(work, lane, words),
                    _queries(work, lane, out),
                    _queries(work, lane, top),
                    None if grad_lse is None else _queries(work, lane, grad_lse),
                )
                _write(work, lane, sums[0], _queries(work, lane, sums[0]).add_(dq))
                grad_keys.add(work, dk)
                grad_values.add(work, dv)
            grad_keys.close()
            grad_values.close()


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


def _schedule(group: Group, kernel: Kernel, q: Tensor, k: Tensor) -> Iterator[tuple[_Lane, list[Tile | Run | Gather]]]:
    """Yield lanes and what they run, in an order that keeps the order of the work for each query.

    Small tiles run for all heads at once. What lies between them runs head by head, so that a head's keys stay in the cache.
    """
    waiting: list[Tile | Run | Gather] = []
    for work in group.work:
        if _is_small(work, group, kernel, q, k):
            yield from _one_by_one(waiting, group, q, k)
            waiting = []
            yield _all_heads(group, q, k), [work]
        else:
            waiting.append(work)
    yield from _one_by_one(waiting, group, q, k)


def _is_small(work: Tile | Run | Gather, group: Group, kernel: Kernel, q: Tensor, k: Tensor) -> bool:
    """Say whether a tile runs for all heads at once."""
    if not isinstance(work, Tile) or group.heads[-1] - group.heads[0] + 1 != len(group.heads):
        return False
    tokens, keys = _length(work.q, q.shape[2]), _length(work.k, k.shape[2])
    elements = max(tokens, keys) * q.shape[3] if kernel.is_fused else tokens * keys
    return elements * len(group.heads) * q.shape[0] <= CALL_ELEMENTS


def _all_heads(group: Group, q: Tensor, k: Tensor) -> _Lane:
    ratio = q.shape[1] // k.shape[1]
    heads = slice(group.heads[0], group.heads[-1] + 1)
    index = torch.tensor([head // ratio for head in group.heads], device=k.device) if ratio > 1 else heads
    return _Lane(slice(None), heads, index, None)


def _one_by_one(
    works: list[Tile | Run | Gather], group: Group, q: Tensor, k: Tensor
) -> Iterator[tuple[_Lane, list[Tile | Run | Gather]]]:
    ratio = q.shape[1] // k.shape[1]
    for i, head in enumerate(group.heads):
        own = [work for work in works if not isinstance(work, Gather) or i in work.heads]
        for row in range(q.shape[0] if own else 0):
            key_head = slice(head // ratio, head // ratio + 1)
            yield _Lane(slice(row, row + 1), slice(head, head + 1), key_head, slice(i, i + 1)), own


class _Keys:
    """The side of the keys of a lane: keys, values, or the sums of their gradients.

    Args:
        lane: the lane.
        works: what it runs.
        tensor: float ``[B, G, S, D]``.
        is_sum: whether it is added to.
    """

    def __init__(self, lane: _Lane, works: list[Tile | Run | Gather], tensor: Tensor, *, is_sum: bool = False) -> None:
        self.lane, self.tensor = lane, tensor
        self.own = self.held = None
        if lane.heads_in_group is not None:
            # one head, ``[S, D]``: blocks named by index are read and added several times faster where they lie dense
            self.own = self.held = tensor[lane.rows, lane.key_heads][0, 0]
            if any(isinstance(work, Gather) for work in works) and not self.own.is_contiguous():
                self.held = (
                    torch.zeros(self.own.shape, dtype=tensor.dtype, device=tensor.device)
                    if is_sum
                    else self.own.contiguous()
                )

    def of(self, work: Tile | Run | Gather) -> Tensor:
        """Return the keys of a tile ``[X, H, S, D]``: a view, or a copy where they are named by index."""
        if self.held is None:
            assert isinstance(work, Tile)
            return self.tensor[self.lane.rows, :, work.k][:, self.lane.key_heads]
        return _keys_of(work, self.held)

    def add(self, work: Tile | Run | Gather, grad: Tensor) -> None:
        """Add the gradient of a tile's keys ``[X, H, S, D]``."""
        if self.held is not None:
            _add_keys(work, self.held, grad[:, 0])
            return
        assert isinstance(work, Tile)
        at = self.tensor[self.lane.rows, :, work.k]
        if isinstance(self.lane.key_heads, slice):
            at[:, self.lane.key_heads] += grad
        else:
            at.index_add_(1, self.lane.key_heads, grad)
        if isinstance(work.k, Tensor):
            self.tensor[self.lane.rows, :, work.k] = at

    def close(self) -> None:
        """Add what was held apart."""
        if self.own is not None and self.held is not None and self.held is not self.own:
            self.own.add_(self.held)


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


def _keys_of(work: Tile | Run | Gather, tokens: Tensor) -> Tensor:
    """Return the keys of a tile ``[X, 1, S, ...]`` from all tokens of a lane ``[n, ...]``."""
    if isinstance(work, Tile):
        return tokens[work.k][None, None]
    if isinstance(work, Gather):
        held = _units(work, tokens).index_select(0, work.index.flatten().to(tokens.device))
        return held.flatten(0, 1).unflatten(0, (len(work.index), -1))[:, None]
    return _windows(work, tokens[work.offset :: work.step], 0, work.width)[:, None]


def _units(work: Gather, tokens: Tensor) -> Tensor:
    """Return whole units of keys ``[units, unit, ...]``, as a view."""
    units = len(tokens) // work.unit
    return tokens[: units * work.unit].unflatten(0, (units, work.unit))


def _windows(work: Run, tokens: Tensor, skip: int, width: int) -> Tensor:
    first = work.first - work.back + skip
    windows = tokens[first : first + (work.blocks - 1) * work.block + width].unfold(0, width, work.block)
    return windows.movedim(-1, 1)


def _add_keys(work: Tile | Run | Gather, total: Tensor, grad: Tensor) -> None:
    """Add the gradient of a tile's keys ``[X, S, D]`` to all tokens of a lane ``[n, D]``."""
    if isinstance(work, Tile):
        total[work.k] += grad[0]
    elif isinstance(work, Gather):
        units = grad.flatten(0, 1).unflatten(0, (-1, work.unit))
        _units(work, total).index_add_(0, work.index.flatten().to(total.device), units)
    else:
        tokens = total[work.offset :: work.step]
        for skip in range(0, work.width, work.block):
            # windows cut to one block do not overlap
            width = min(work.block, work.width - skip)
            _windows(work, tokens, skip, width).add_(grad[:, skip : skip + width])


def _words(work: Tile | Run | Gather, lane: _Lane, words: Words | None) -> Words | None:
    """Return the words of a tile's queries ``[X, H, T]`` and keys, broadcastable to ``[X, H, S]``."""
    if words is None:
        return None
    return _queries(work, lane, words[0]), _keys_of(work, words[1])


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
