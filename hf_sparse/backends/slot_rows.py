"""Vectors of one lane as its blocks want them: picked by index or as stretches of the sorted sequence, and their sums."""

import torch
from torch import Tensor

from hf_sparse.slots import Slots


class Rows:
    """Rows collected piece by piece, lane after lane in the same memory: asked for anew it would cost as much as the work.

    Args:
        like: of what dtype and where.
        width: of a row.
    """

    def __init__(self, like: Tensor, width: int) -> None:
        self._held, self._count = like.new_empty(0, width), 0

    def room(self, count: int) -> Tensor:
        """Return room for more rows, ``[count, width]``."""
        first, last = self._count, self._count + count
        if last > len(self._held):
            more = self._held.new_empty(2 * last, self._held.shape[1])
            more[:first] = self._held[:first]
            self._held = more
        self._count = last
        return self._held[first:last]

    @property
    def held(self) -> Tensor:
        """The rows so far ``[Y, width]``, good until the next ``room``."""
        return self._held[: self._count]

    def take(self) -> Tensor:
        """Return the rows ``[Y, width]``, good until the next ``room``, and begin anew."""
        last, self._count = self._count, 0
        return self._held[:last]


class Sums:
    """Sums of rows that stand at the same place; gathers, which are many times as fast as adding where they stand.

    Args:
        at: int64 ``[X]``, the place of each row; -1 drops it.
        tokens: places.
    """

    def __init__(self, at: Tensor, tokens: int) -> None:
        self._at, self._tokens = at.masked_fill(at < 0, tokens), tokens
        counts = torch.bincount(self._at, minlength=tokens + 1)[:tokens]
        least, most = (int(count) for count in counts.aminmax())
        self.is_single, self._is_full = most <= 1, least > 0
        # a place with many more rows than others would make the table long
        self._table: Tensor | None = None
        if self.is_single and self._is_full:
            rows = torch.arange(len(at), device=at.device)
            self._table = torch.empty_like(at[:1]).expand(tokens + 1).clone().scatter_(0, self._at, rows)[None, :tokens]
        elif self.is_single or most * tokens <= 4 * len(at):
            order = torch.argsort(self._at, stable=True)
            first, step = counts.cumsum(0) - counts, torch.arange(max(most, 1), device=at.device)[:, None]
            listed = order[(first + step).clamp(max=max(len(at) - 1, 0))]
            self._table = listed.masked_fill(step >= counts, len(at))

    def __call__(self, rows: Tensor, nothing: float = 0.0) -> Tensor:
        """Return ``[tokens, D]`` for rows ``[X, D]``; ``nothing`` where a place has no row, if none has several."""
        if self._table is None:
            return rows.new_zeros(self._tokens + 1, rows.shape[1]).index_add_(0, self._at, rows)[: self._tokens]
        if not (self.is_single and self._is_full):
            rows = torch.cat([rows, rows.new_full((1, rows.shape[1]), nothing)])
        total = rows.index_select(0, self._table[0])
        for line in self._table[1:]:
            total += rows.index_select(0, line)
        return total


class NamedKeys:
    """Keys of blocks that name them one by one.

    Attributes:
        places: int64 ``[Y]``, where the sums of ``open_sum`` belong; -1 to nobody.

    Args:
        slots: the blocks.
        own: which of them are on this lane.
        vectors: float ``[S, D]``, of the lane.
    """

    def __init__(self, slots: Slots, own: slice, vectors: Tensor) -> None:
        self._keys, self._first, self._vectors = slots.keys, own.start, vectors
        self.places = slots.keys[own].flatten()

    def of(self, at: slice) -> Tensor:
        """Return the keys of some blocks ``[X, S, D]``; any vector for -1."""
        return rows_at(self._vectors, self._keys[at])

    def open_sum(self, rows: Rows) -> Tensor:
        """Return room for sums over the queries of all blocks, ``[Y, D]``."""
        return rows.room(len(self.places))

    def add(self, total: Tensor, at: slice, weights: Tensor, queries: Tensor) -> None:
        """Add to the sums of some blocks: weights ``[X, T, S]``, transposed, times queries ``[X, T, D]``."""
        held = total.unflatten(0, (-1, self._keys.shape[1]))
        torch.bmm(weights.transpose(1, 2), queries, out=held[at.start - self._first : at.stop - self._first])


class SortedKeys:
    """Keys of blocks that read their own queries and those of blocks just before: windows over the sorted sequence.

    Every vector is copied once, however many blocks read it. Attributes, arguments and methods as for ``NamedKeys``.
    """

    def __init__(self, slots: Slots, own: slice, vectors: Tensor) -> None:
        assert slots.reach is not None
        self._first, self._size, self._reach = own.start, slots.queries.shape[1], slots.reach
        self.places = torch.nn.functional.pad(slots.queries[own].flatten(), (self._reach * self._size, 0), value=-1)
        self._sorted = rows_at(vectors, self.places)

    def of(self, at: slice) -> Tensor:
        """Return the keys of some blocks ``[X, S, D]``, a view; any vector for -1."""
        size, width = self._size, self._sorted.shape[1]
        shape = at.stop - at.start, (self._reach + 1) * size, width
        return self._sorted.as_strided(shape, (size * width, width, 1), (at.start - self._first) * size * width)

    def open_sum(self, rows: Rows) -> Tensor:
        """Return room for sums over the queries of all blocks, ``[Y, D]``, 0 where no block has its own queries."""
        total = rows.room(len(self.places))
        total[: self._reach * self._size] = 0.0
        return total

    def add(self, total: Tensor, at: slice, weights: Tensor, queries: Tensor) -> None:
        """Add to the sums of some blocks, which come in their order: weights transposed, times queries ``[X, T, D]``."""
        held, first = total.unflatten(0, (-1, self._size)), at.start - self._first
        *before, own = weights.split(self._size, 2)
        # what is added to the queries' own places was written there by an earlier block, or by this line
        torch.bmm(own.transpose(1, 2), queries, out=held[first + self._reach : first + self._reach + len(own)])
        for i, part in enumerate(before):
            held[first + i : first + i + len(part)].baddbmm_(part.transpose(1, 2), queries)


def keys_of(slots: Slots, own: slice, vectors: Tensor) -> NamedKeys | SortedKeys:
    """Return the keys of the blocks ``own`` of a lane, given all its vectors ``[S, D]``."""
    return (NamedKeys if slots.reach is None else SortedKeys)(slots, own, vectors)


def rows_at(vectors: Tensor, at: Tensor) -> Tensor:
    """Return ``[..., D]`` for vectors ``[N, D]`` and places ``[...]``; any vector for -1."""
    return vectors.index_select(0, at.flatten().clamp(min=0)).view(*at.shape, -1)
