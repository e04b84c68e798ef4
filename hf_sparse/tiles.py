"""Tiles: the pieces of work that a plan is made of.

A tile is one dense attention call: some queries against some keys, with a mask where not every pair is an edge. The
tiles of a plan do not overlap, so merging their outputs by logsumexp is exact and a pair counts once.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# masks up to this many elements are kept with the plan; larger ones are made anew for each use
KEPT_MASK = 1 << 17


class Mask:
    """A mask that is made when it is needed, and kept if it is small.

    Args:
        make: returns bool ``[T, S]`` or ``[..., T, S]`` on the CPU.
        keep: the most elements that are kept.
    """

    def __init__(self, make: Callable[[], Tensor], keep: int = KEPT_MASK) -> None:
        self._make, self._keep = make, keep
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def boolean(self) -> Tensor:
        """Return bool ``[..., T, S]`` on the CPU; True where the query reads the key."""
        return self._kept_or("boolean", torch.bool, torch.device("cpu"), self._make)

    def additive(self, like: Tensor) -> Tensor:
        """Return the mask as a term of the scores, 0 where True and -inf elsewhere, on the device and in the dtype given."""
        return self._kept_or(
            "additive", like.dtype, like.device, lambda: _term(self.boolean(), like.dtype).to(like.device)
        )

    @functools.cached_property
    def empty_rows(self) -> Tensor | None:
        """Bool ``[..., T]`` on the CPU, True for queries that read nothing; None where there are none."""
        return _empty_rows(self.boolean())

    @property
    def kept_bytes(self) -> int:
        """What is kept of it."""
        return sum(map(_bytes, list(self._kept.values())))

    def _kept_or(self, name: str, dtype: torch.dtype, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
        if (name, dtype, device) in self._kept:
            return self._kept[name, dtype, device]
        # what is kept may be needed by a backward pass, whatever runs now
        with torch.inference_mode(False):
            made = make()
        if made.numel() <= self._keep:
            self._kept[name, dtype, device] = made
        return made


class MaskByHead(Mask):
    """The mask of a whole sequence whose heads differ: one entry is kept for each block where that is all it says.

    Args:
        drawn: bool ``[1, H, N, N]``.
        block: tokens of a block, if it is one of blocks.
    """

    def __init__(self, drawn: Tensor, block: int) -> None:
        super().__init__(self._blown_up)
        self.empty_rows = _empty_rows(drawn)
        self._length = drawn.shape[-1]
        for self._block, held in ((block, drawn[..., ::block, ::block]), (1, drawn)):
            # 0 and -inf are exact in bfloat16
            self._entries = _term(held, torch.bfloat16)
            if self._block == 1 or torch.equal(self._blown_up(), drawn):
                break

    @property
    def kept_bytes(self) -> int:
        return super().kept_bytes + _bytes(self._entries)

    def of_heads(self, heads: slice, like: Tensor, room: Tensor | None = None) -> Tensor:
        """Return the term of the scores ``[1, H, N, N]`` of some heads, on the device and in the dtype given.

        Args:
            heads: which.
            like: a tensor of that dtype and device.
            room: where it is written, of ``size`` elements for each head; None takes new memory.
        """
        held = self._entries[:, heads]
        # few of them, and then copied without a change of dtype
        held = held.to(like.device, like.dtype if self._block > 1 else held.dtype)
        shape = (1, held.shape[1], held.shape[2], self._block, held.shape[3], self._block)
        found = like.new_empty(shape) if room is None else room[: math.prod(shape)].view(shape)
        found.copy_(held[:, :, :, None, :, None])
        return found.flatten(4, 5).flatten(2, 3)[..., : self._length, : self._length]

    @property
    def size(self) -> int:
        """Elements of the room that a head's term is written to."""
        return math.prod(self._entries.shape[2:]) * self._block**2

    def _blown_up(self) -> Tensor:
        return self.of_heads(slice(None), self._entries) == 0


def _term(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a mask is True and -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _empty_rows(mask: Tensor) -> Tensor | None:
    is_empty = ~mask.any(-1)
    return is_empty if bool(is_empty.any()) else None


@dataclass(frozen=True, eq=False)
class Tile:
    """Queries against keys, for all heads of its group.

    Attributes:
        q: the queries: a slice, or int64 positions.
        k: the keys: a slice, or int64 positions.
        mask: bool ``[Tq, Sk]`` or ``[1, H, Tq, Sk]``, or None where every pair is an edge.
        is_first: whether no earlier tile wrote to these queries.
        is_row: whether these are rows of global tokens, which overwrite what earlier tiles wrote.
    """

    q: slice | Tensor
    k: slice | Tensor
    mask: Mask | None
    is_first: bool
    is_row: bool = False

    def scores(self, length: int) -> int:
        """Return the scores computed for one head in a sequence of ``length`` tokens."""
        return count(self.q, length) * count(self.k, length)


@dataclass(frozen=True, eq=False)
class Run:
    """Blocks of queries, each against a window of keys at the same place beside it, read as strided views.

    The sequence is ``tokens[offset::step]``; block i holds the queries from ``first + i * stride`` on and reads ``width``
    keys from ``first + i * stride - back`` on. All blocks share one mask ``[block, width]``.
    """

    offset: int
    step: int
    first: int
    blocks: int
    block: int
    stride: int
    back: int
    width: int
    mask: Mask | None
    is_first: bool

    def scores(self, _length: int) -> int:
        """Return the scores computed for one head."""
        return self.blocks * self.block * self.width

    def consecutive(self, most: int) -> Iterator["Run"]:
        """Cut the blocks into pieces of at most ``most`` scores, or of one block."""
        count = max(1, most // (self.block * self.width))
        for i in range(0, self.blocks, count):
            yield replace(self, first=self.first + i * self.stride, blocks=min(count, self.blocks - i))

    def apart(self, most: int) -> Iterator["Run"]:
        """Cut the blocks into pieces of at most ``most`` scores, or of one block, whose windows do not overlap."""
        gap = -(-self.width // self.stride)
        for i in range(min(gap, self.blocks)):
            blocks = len(range(i, self.blocks, gap))
            every = replace(self, first=self.first + i * self.stride, blocks=blocks, stride=gap * self.stride)
            yield from every.consecutive(most)


@dataclass(frozen=True, eq=False)
class Gather:
    """Consecutive blocks of queries, each against blocks of keys named by index.

    Attributes:
        heads: heads it serves, counted within its group.
        first: position of the first query.
        block: queries of a block.
        index: int64 ``[blocks, W]``, which ``unit`` keys, counted in units; where the mask is False any valid index.
        unit: consecutive keys that one index names.
        mask: bool ``[blocks, block, W * unit]``, or None where every pair is an edge.
        is_first: as for a tile.
    """

    heads: tuple[int, ...]
    first: int
    block: int
    index: Tensor
    unit: int
    mask: Mask | None
    is_first: bool

    def scores(self, _length: int) -> int:
        """Return the scores computed for one head."""
        return self.block * self.index.numel() * self.unit


Work = Tile | Run | Gather


def count(tokens: slice | Tensor, length: int) -> int:
    """Return how many of ``length`` tokens a slice or positions name."""
    return len(range(*tokens.indices(length))) if isinstance(tokens, slice) else len(tokens)


@dataclass(frozen=True, eq=False)
class Group:
    """Heads that share their parts, and the work for them.

    Attributes:
        heads: the heads, ascending.
        work: what to run, in this order.
        rows: int64, global queries; their row tiles come last and overwrite what other tiles wrote.
        invalid: int64, queries that are no real tokens: they get nothing, whatever tiles wrote.
    """

    heads: tuple[int, ...]
    work: tuple[Work, ...]
    rows: Tensor
    invalid: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """All work of one attention layer on one sequence."""

    length: int
    groups: tuple[Group, ...] = field(default=())

    @property
    def is_whole(self) -> bool:
        """Whether each group of heads runs in one tile over all pairs."""
        everything = slice(0, self.length)
        return all(
            len(group.work) == 1
            and isinstance(group.work[0], Tile)
            and (group.work[0].q, group.work[0].k) == (everything, everything)
            for group in self.groups
        )

    @property
    def differs_by_head(self) -> bool:
        """Whether heads read other keys than one another."""
        return len(self.groups) > 1 or any(
            isinstance(work, Gather) and len(work.heads) < len(group.heads)
            for group in self.groups
            for work in group.work
        )

    @functools.cached_property
    def writes_all(self) -> bool:
        """Whether all queries of all heads are written, whatever stood there: by a first tile, or as no real token."""
        position = torch.arange(self.length)
        for group in self.groups:
            written = torch.zeros(len(group.heads), self.length, dtype=torch.bool)
            written[:, group.invalid] = True
            for work in group.work:
                if work.is_first:
                    heads = work.heads if isinstance(work, Gather) else range(len(group.heads))
                    written[torch.tensor(heads)[:, None], _queries(work, position).flatten()] = True
            if not written.all():
                return False
        return True

    @property
    def kept_bytes(self) -> int:
        """About what the plan holds: masks as far as they were made and kept, what they are made of, and indices."""
        total = 0
        for work in (work for group in self.groups for work in group.work):
            total += 0 if work.mask is None else work.mask.kept_bytes
            if isinstance(work, Gather):
                # a mask is made of the position of every key
                total += _bytes(work.index) * (1 if work.mask is None else 1 + work.unit)
            elif isinstance(work, Tile):
                total += sum(_bytes(tokens) for tokens in (work.q, work.k) if isinstance(tokens, Tensor))
        return total

    def count_work(self) -> tuple[int, int, int]:
        """Return the scores computed for one row, those among them of keys named by index, and about the kernel calls."""
        scores = gathered = calls = 0
        for group in self.groups:
            for work in group.work:
                heads = len(work.heads if isinstance(work, Gather) else group.heads)
                scores += heads * work.scores(self.length)
                gathered += heads * work.scores(self.length) if isinstance(work, Gather) else 0
                calls += 1 if isinstance(work, Tile) else heads
        return scores, gathered, calls

    def count_edges(self) -> int:
        """Return the number of edges over all heads, each once."""
        return sum(_count_group(group, self.length) for group in self.groups)


def _queries(work: Work, position: Tensor) -> Tensor:
    """Return the positions of queries: of a tile in a row, else ``[blocks, block]``."""
    if isinstance(work, Tile):
        return position[work.q]
    if isinstance(work, Run):
        held = position[work.offset :: work.step][work.first : work.first + work.blocks * work.block]
        return held.view(work.blocks, work.block)
    return position[work.first : work.first + len(work.index) * work.block].view(len(work.index), work.block)


def _count_group(group: Group, length: int) -> int:
    """Return the edges of a group: what row tiles overwrite counts in the row tiles alone."""
    position = torch.arange(length)
    is_row = torch.zeros(length, dtype=torch.bool)
    is_row[group.rows] = True
    is_invalid = torch.zeros(length, dtype=torch.bool)
    is_invalid[group.invalid] = True
    total = 0
    for work in group.work:
        q = _queries(work, position)
        if isinstance(work, Tile):
            keys, heads = len(position[work.k]), len(group.heads)
        elif isinstance(work, Run):
            keys, heads = work.width, len(group.heads)
        else:
            keys, heads = work.index.shape[1] * work.unit, len(work.heads)
        read = work.mask.boolean().sum(-1) if work.mask is not None else torch.tensor(keys)
        counts = read.expand(q.shape).masked_fill(is_invalid[q], 0)
        if not (isinstance(work, Tile) and work.is_row):
            counts = counts.masked_fill(is_row[q], 0)
        total += int(counts.sum()) * heads
    return total
