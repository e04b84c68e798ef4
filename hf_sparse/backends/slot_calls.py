"""One call over slots: which blocks there are on each lane, and who reads whom inside them."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.parts import Part
from hf_sparse.slots import Assignment, Finder, Slots

# scores of one kernel call
CALL_SCORES = 1 << 20

# some blocks, and who reads whom in them: bool [X or 1, T, S], None for all
Piece = tuple[slice, Tensor | None]


@dataclass(eq=False)
class SlotCall:
    """One call over the slots of some rows of one sequence.

    Attributes:
        assignment: who reads whom.
        heads: query heads held here.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        positions: int64 ``[N]``, logical, of the tokens; what the parts speak of. Keys from N on that are no copies of tokens
            are read by every query.
        dropout: probability of dropping an attention probability.
        words: of the dropout, int32 ``[B, H, N]`` and ``[S]``; None without it.
        parts: a pair of tokens that one of these allows is none of ours.
    """

    assignment: Assignment
    heads: int
    is_causal: bool
    scale: float
    positions: Tensor
    dropout: float = 0.0
    words: tuple[Tensor, Tensor] | None = None
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        self._stretches = [_stretches(slots) for slots in self.assignment.slots]

    def rounds(self, lane: int) -> Iterator[tuple[Slots, slice, Iterator[Piece]]]:
        """Yield slots, which of their blocks are on a lane, and pieces of these."""
        repeats = self.assignment.repeats
        finder = None if repeats is None else repeats.on(lane)
        for slots, stretches in zip(self.assignment.slots, self._stretches, strict=True):
            own = stretches.get(lane, ())
            if own:
                yield slots, slice(own[0][0], own[-1][1]), self._pieces(slots, own, lane, finder)

    def pieces(self, lane: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield queries ``[X, T]``, keys ``[X, S]`` and who reads whom, bool ``[X or 1, T, S]``; None for all."""
        for slots, _, pieces in self.rounds(lane):
            for at, allowed in pieces:
                yield slots.queries[at], slots.keys[at], allowed

    def _pieces(
        self, slots: Slots, stretches: Sequence[tuple[int, int, bool]], lane: int, finder: Finder | None
    ) -> Iterator[Piece]:
        step = max(1, CALL_SCORES // max(slots.queries.shape[1] * slots.keys.shape[1], 1))
        for first, last, has_gaps in stretches:
            for start in range(first, last, step):
                at = slice(start, min(start + step, last))
                yield at, self._allowed(slots, at, lane, has_gaps, finder)

    def allowed_of(self, slots: Slots, lane: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the blocks of a lane some at a time: which they are, and who reads whom, bool ``[X, T, S]``."""
        finder = None if self.assignment.repeats is None else self.assignment.repeats.on(lane)
        first, last = (int(torch.searchsorted(slots.lane, edge)) for edge in (lane, lane + 1))
        step = max(1, CALL_SCORES // max(slots.queries.shape[1] * slots.keys.shape[1], 1))
        for start in range(first, last, step):
            at = slice(start, min(start + step, last))
            allowed = self._allowed(slots, at, lane, True, finder)
            assert allowed is not None
            yield at, allowed

    def _allowed(self, slots: Slots, at: slice, lane: int, has_gaps: bool, finder: Finder | None) -> Tensor | None:
        queries, keys = slots.queries[at], slots.keys[at]
        q, k, tokens = queries.clamp(min=0), keys.clamp(min=0), len(self.positions)
        is_token = k < tokens
        if self.assignment.copies is not None:
            k = torch.where(is_token, k, self.assignment.copies[lane][(k - tokens).clamp(min=0)])
            is_token = torch.ones_like(is_token)
        is_token = is_token[:, None, :]
        terms = []
        if has_gaps:
            terms.append((queries >= 0)[:, :, None] & (keys >= 0)[:, None, :])
        if self.is_causal:
            terms.append((k[:, None, :] <= q[:, :, None]) | ~is_token)
        if not self.assignment.reads_self and slots.reach is None:
            terms.append(k[:, None, :] != q[:, :, None])
        if finder is not None and slots.rank is not None and bool(slots.rank[at].any()):
            terms.append(finder(slots.rank[at], q, k).logical_not_())
        if self.parts:
            head = lane % self.heads
            q_at, k_at = self.positions[q][:, :, None], self.positions[k.clamp(max=tokens - 1)][:, None, :]
            for part in self.parts:
                if part.heads is None or head in part.heads:
                    others = part.allows(q_at, k_at)
                    terms.append(~((others[head] if others.shape[0] > 1 else others[0]) & is_token))
        allowed = functools.reduce(torch.Tensor.logical_and_, terms) if terms else None
        if not self.assignment.reads_self and slots.reach is not None:
            # the same pairs in every block
            size = queries.shape[1]
            is_other = torch.ones(1, size, keys.shape[1], dtype=torch.bool, device=q.device)
            is_other[0, :, slots.reach * size :].fill_diagonal_(False)
            allowed = is_other if allowed is None else allowed.logical_and_(is_other)
        return allowed

    def counts(self, batch: int, keys: int) -> Tensor:
        """Return how often each query reads each key, int64 ``[B, H, N, S]``, for ``keys`` keys."""
        device = self.positions.device
        found = torch.zeros(batch * self.heads, len(self.positions), keys, dtype=torch.int64, device=device)
        for lane, own in enumerate(found):
            for queries, held, allowed in self.pieces(lane):
                places = torch.broadcast_tensors(queries[:, :, None], held[:, None, :])
                at = [x.flatten() if allowed is None else x[allowed.expand(x.shape)] for x in places]
                own.index_put_(at, torch.ones_like(at[0]), accumulate=True)
        return found.unflatten(0, (batch, self.heads))


def _stretches(slots: Slots) -> dict[int, list[tuple[int, int, bool]]]:
    """Return the blocks of each lane in stretches: the first, behind the last, and whether places are missing in them.

    Where whole blocks and others alternate often, a stretch holds both.
    """
    if not len(slots.lane):
        return {}
    has_gaps = (slots.queries < 0).any(1) | (slots.keys < 0).any(1)
    kinds = slots.lane * 2 + has_gaps
    _, counts = torch.unique_consecutive(kinds, return_counts=True)
    lanes = len(torch.unique_consecutive(slots.lane))
    if len(counts) > 4 * lanes:
        has_gaps = torch.ones_like(has_gaps)
        _, counts = torch.unique_consecutive(slots.lane, return_counts=True)
    ends = counts.cumsum(0).tolist()
    found: dict[int, list[tuple[int, int, bool]]] = {}
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        found.setdefault(int(slots.lane[first]), []).append((first, last, bool(has_gaps[first])))
    return found
