"""A pattern as the mask function of FlexAttention reads it: per-token tags, and a few numbers for each head.

All parts of a pattern come down to bands, tables and global tokens, whose numbers are data, so that one compiled kernel
serves patterns, layers and lengths.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Globals, Part, Scope, Window, with_global_positions
from hf_sparse.patterns import Pattern

# farther than any token
FAR = 1 << 30


class Band(NamedTuple):
    """Numbers of a window, int32 ``[H]`` each.

    With positions counted in blocks of ``size``, a query reads keys at most ``before`` behind and ``after`` ahead whose
    distance is a multiple of ``step``.
    """

    size: Tensor
    step: Tensor
    before: Tensor
    after: Tensor


class Table(NamedTuple):
    """Blocks of keys named by a table.

    Attributes:
        size: int32 ``[H]``, tokens of a block.
        q_row: int32 ``[R, T]``, the query's row of the table.
        columns: int32 ``[H, rows]`` each, a block of keys that a row of queries reads; below 0 means none.
    """

    size: Tensor
    q_row: Tensor
    columns: tuple[Tensor, ...]


class Tags(NamedTuple):
    """What decides whether a query reads a key. Rows R: 1 where all samples are alike; heads X: 1 where all are alike.

    Attributes:
        q_segment: int32 ``[R, X, T]``, a query reads its own segment alone; -1 reads nothing.
        k_segment: int32 ``[R, S]``; -2 is read by nobody.
        q_position: int32 ``[R, T]``, logical.
        k_position: int32 ``[R, S]``, logical.
        q_global: bool ``[R, X, T]``, or None for a pattern without global tokens.
        k_global: bool ``[R, X, S]``, or None.
        bands: the windows, of tokens and of blocks.
        tables: the tables.

    Every number is a tensor that is indexed by tensors alone, never by an int beside one: indexing of that kind is what
    FlexAttention traces into its kernels.
    """

    q_segment: Tensor
    k_segment: Tensor
    q_position: Tensor
    k_position: Tensor
    q_global: Tensor | None
    k_global: Tensor | None
    bands: tuple[Band, ...]
    tables: tuple[Table, ...]


class Layout(NamedTuple):
    """Blocks and tags of one call.

    Attributes:
        blocks: four pairs of int32 counts ``[R, X, rows]`` and indices ``[R, X, rows, W]``: the blocks of keys that a block
            of queries reads in part, those it reads whole, and both the other way round.
        tags: what decides inside the blocks that are read in part.
    """

    blocks: tuple[Tensor, ...]
    tags: Tags

    def spread(self, batch: int, heads: int, device: torch.device) -> "Layout":
        """Return the layout on a device, with R rows for a batch of R, alike or not, and tags for each head."""

        def over_batch(t: Tensor) -> Tensor:
            # a copy in any case: a compiled function has a graph of its own for tensors that are one and the same
            return t.to(device).repeat(batch // t.shape[0], *[1] * (t.dim() - 1))

        def over_heads(t: Tensor | None) -> Tensor | None:
            return None if t is None else over_batch(t).expand(-1, heads, -1)

        q_segment, k_segment, q_position, k_position, q_global, k_global, bands, tables = self.tags
        tags = Tags(
            over_batch(q_segment).expand(-1, heads, -1),
            over_batch(k_segment),
            over_batch(q_position),
            over_batch(k_position),
            over_heads(q_global),
            over_heads(k_global),
            tuple(Band(*(t.to(device) for t in band)) for band in bands),
            tuple(
                Table(table.size.to(device), over_batch(table.q_row), tuple(t.to(device) for t in table.columns))
                for table in tables
            ),
        )
        return Layout(tuple(over_batch(t) for t in self.blocks), tags)


class Rule:
    """The parts of a pattern over some sequences, as bands, tables and global tokens.

    Attributes:
        lanes: the heads of each lane; heads of a lane have the same parts.
        bands: int64 ``[H, bands, 4]``: size, step, before and after of each ``Band``.
        tables: int64 ``[H, rows, W]`` each; below 0 means none; the last row is empty.
        sizes: tokens of a block of each table.
    """

    def __init__(self, pattern: Pattern, scope: Scope, sequences: Sequence[tuple[int, tuple[int, ...] | None]]) -> None:
        self.scope, self.sequences = scope, sequences
        by_length: dict[int, tuple[Part, ...]] = {}
        self.parts: list[tuple[Part, ...]] = []
        for length, positions in sequences:
            if length not in by_length:
                by_length[length] = pattern.parts(dataclasses.replace(scope, length=length))
            self.parts.append(with_global_positions(by_length[length], positions))
        first = self.parts[0] if self.parts else pattern.parts(scope)
        if not serves(pattern, first):
            raise ValueError(f"backend 'flex' does not serve pattern {pattern.key!r}; pass backend='gather'")
        if any(_signature(parts) != _signature(first) for parts in self.parts):
            raise ValueError(
                f"backend 'flex' does not serve pattern {pattern.key!r}, whose parts change with the length; "
                f"pass backend='gather'"
            )
        by_parts: dict[tuple[int, ...], list[int]] = {}
        for head in range(scope.heads):
            held = tuple(i for i, part in enumerate(first) if part.heads is None or head in part.heads)
            by_parts.setdefault(held, []).append(head)
        self.lanes, self.held = list(by_parts.values()), list(by_parts)
        self.has_globals = any(isinstance(part, Globals) for part in first)
        bands = [part for part in first if isinstance(part, Window | BlockWindow)]
        self.bands = torch.stack([_band(part, scope.heads) for part in bands], 1) if bands else torch.zeros(1, 0, 4)
        self.bands = self.bands.long().expand(scope.heads, -1, -1)
        at = [i for i, part in enumerate(first) if isinstance(part, BlockTable)]
        self.sizes = [first[i].block for i in at]  # type: ignore[attr-defined]
        self.stacks = [[parts[i].table for parts in self.parts] for i in at]  # type: ignore[attr-defined]
        self.tables = [self._stack(stack, first[i]) for stack, i in zip(self.stacks, at, strict=True)]
        self.differs_by_head = len(self.lanes) > 1 or any(t.shape[0] > 1 for stack in self.stacks for t in stack)

    def _stack(self, stack: list[Tensor], part: Part) -> Tensor:
        """Put the tables of all sequences below one another, and an empty row below them."""
        heads, width = self.scope.heads, max((t.shape[2] for t in stack), default=0)
        padded = [torch.nn.functional.pad(t.expand(heads, -1, -1), (0, width - t.shape[2]), value=-1) for t in stack]
        table = torch.cat([*padded, torch.full((heads, 1, width), -1)], 1).clone()
        if part.heads is not None:
            table[[head for head in range(heads) if head not in part.heads]] = -1
        # no key stands in block -FAR, whereas padding on the left may stand in block -1
        return table.masked_fill_(table < 0, -FAR)

    def spans(self, sequence: int) -> list[tuple[int, int]]:
        """Return the first row and the number of rows that a sequence has in each table."""
        return [(sum(t.shape[1] for t in stack[:sequence]), stack[sequence].shape[1]) for stack in self.stacks]

    def global_positions(self, sequence: int, lane: int) -> list[tuple[Tensor, bool]]:
        """Return the positions of each part of global tokens, and whether they have projections of their own."""
        length = self.sequences[sequence][0]
        held = [self.parts[sequence][i] for i in self.held[lane]]
        return [
            (torch.tensor([p for p in part.positions if p < length], dtype=torch.int64), part.has_projections)
            for part in held
            if isinstance(part, Globals)
        ]

    def tags(
        self,
        q_segment: Tensor,
        k_segment: Tensor,
        q_position: Tensor,
        k_position: Tensor,
        q_global: Tensor,
        k_global: Tensor,
        q_rows: Sequence[Tensor],
    ) -> Tags:
        """Return the tags; tensors of lanes ``[R, lanes, T]`` become tensors of heads."""
        lane_of = torch.zeros(self.scope.heads, dtype=torch.int64)
        for lane, heads in enumerate(self.lanes):
            lane_of[heads] = lane
        q_segment, q_global, k_global = (
            (t if len(self.lanes) == 1 else t[:, lane_of]).contiguous() for t in (q_segment, q_global, k_global)
        )
        return Tags(
            q_segment.int(),
            k_segment.int(),
            q_position.int(),
            k_position.int(),
            q_global if self.has_globals else None,
            k_global if self.has_globals else None,
            tuple(Band(*(t.clone() for t in band.unbind(1))) for band in self.bands.int().unbind(1)),
            tuple(
                Table(
                    torch.full((self.scope.heads,), size, dtype=torch.int32),
                    q_row.int(),
                    tuple(t.contiguous() for t in table.int().unbind(2)),
                )
                for table, size, q_row in zip(self.tables, self.sizes, q_rows, strict=True)
            ),
        )


def serves(pattern: Pattern, parts: Sequence[Part]) -> bool:
    """Say whether a pattern, whose parts are given, comes down to bands, tables and global tokens."""
    return not pattern.has_nodes and all(
        isinstance(part, Window | BlockTable)
        or (isinstance(part, BlockWindow) and part.is_of_blocks)
        or (isinstance(part, Globals) and part.reads_all)
        for part in parts
    )


def takes_part(is_own: Tensor, rows: str) -> Tensor:
    """Say which queries a call serves, given those that have projections of their own."""
    if rows == "all":
        return torch.ones_like(is_own)
    return is_own if rows == "own" else ~is_own


def _signature(parts: Sequence[Part]) -> list[tuple[object, ...]]:
    """Return what must not change between sequences: all but tables and global positions."""
    return [
        (type(part), part.heads, *(getattr(part, name, None) for name in ("before", "after", "dilation", "block")))
        for part in parts
    ]


def _band(part: Window | BlockWindow, heads: int) -> Tensor:
    """Return a window as int64 ``[H, 4]``: size, step, before, after; nothing is both behind and ahead by one."""
    size, step = (1, part.dilation) if isinstance(part, Window) else (part.block, 1)
    before, after = (FAR if n is None else min(n * step // size, FAR) for n in (part.before, part.after))
    band = torch.tensor([size, step, before, after]).repeat(heads, 1)
    if part.heads is not None:
        band[[head for head in range(heads) if head not in part.heads], 2:] = -1
    return band
