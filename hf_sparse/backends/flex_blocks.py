"""The blocks that FlexAttention reads, found by arithmetic on intervals in O(blocks read): no pair of tokens is looked at."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.backends.flex_tags import FAR, Layout, Rule, Tags, takes_part
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from hf_sparse.segments import Segment, logical_length

# tokens of a block: what FlexAttention's kernels are tuned for
BLOCK = 128


@functools.lru_cache(maxsize=32)
def cached_layout(
    pattern: Pattern,
    scope: Scope,
    segments: tuple[Segment, ...],
    distinct: int,
    batch: int,
    rows: str,
    device: torch.device,
) -> Layout:
    """Return the layout of a pattern over a batch; equal calls get the same object.

    Args:
        pattern: the pattern.
        scope: heads, layer and causality; its length is that of a row of the batch.
        segments: the sequences of the batch, or of row 0 where all rows are alike.
        distinct: rows that the segments describe: those of the batch, or 1.
        batch: rows of the batch.
        rows: "all" rows; "shared", without those of global tokens that have projections of their own; or "own", only those.
        device: where the layout is needed.

    Raises:
        ValueError: if what the pattern is made of changes with the length of a segment.
    """
    # it may serve a backward pass later, whatever runs now
    with torch.inference_mode(False), torch.device("cpu"):
        rule = Rule(pattern, scope, [(s.stop - s.start, s.global_positions) for s in segments])
        return _Builder(rule, segments, distinct, scope, rows).build().spread(batch, scope.heads, device)


def positional_layout(
    pattern: Pattern,
    scope: Scope,
    q_positions: Tensor,
    k_positions: Tensor,
    is_real: Tensor,
    global_mask: Tensor | None,
    rows: str,
) -> Layout:
    """Return the layout for queries that are not the keys, as in cached decoding: every block is read in part.

    Args:
        pattern: the pattern.
        scope: heads, layer and causality.
        q_positions: int64 ``[B, T]``, logical.
        k_positions: int64 ``[B, S]``, logical.
        is_real: bool ``[B, S]``.
        global_mask: bool ``[B, S]``, or None.
        rows: as for ``cached_layout``.
    """
    q, k, real = q_positions.cpu(), k_positions.cpu(), is_real.cpu()
    batch, tokens = q.shape
    sequences: list[tuple[int, tuple[int, ...] | None]] = []
    for row in range(batch):
        held = None if global_mask is None else tuple(k[row][global_mask[row].cpu()].tolist())
        sequences.append((logical_length(k[row], real[row], reads_padding=pattern.reads_padding), held))
    rule = Rule(pattern, scope, sequences)
    q_global, q_own, k_global = (
        torch.zeros(batch, len(rule.lanes), n, dtype=torch.bool) for n in (tokens, tokens, k.shape[1])
    )
    q_rows = [torch.full_like(q, table.shape[1] - 1) for table in rule.tables]
    for row in range(batch):
        for lane in range(len(rule.lanes)):
            for positions, is_own in rule.global_positions(row, lane):
                q_global[row, lane] |= torch.isin(q[row], positions)
                k_global[row, lane] |= torch.isin(k[row], positions)
                q_own[row, lane] |= is_own & torch.isin(q[row], positions)
        for held_rows, size, (first, count) in zip(q_rows, rule.sizes, rule.spans(row), strict=True):
            block = q[row] // size
            is_inside = (block >= 0) & (block < count)
            held_rows[row, is_inside] = first + block[is_inside]
    segment = torch.where(takes_part(q_own, rows), 0, -1)
    tags = rule.tags(segment, torch.where(real, 0, -2), q, k, q_global, k_global, q_rows)
    q_blocks, k_blocks = -(-tokens // BLOCK), -(-k.shape[1] // BLOCK)
    every = torch.arange(q_blocks * k_blocks)
    layout = Layout(_block_tables(every, every[:0], 1, 1, q_blocks, k_blocks), tags)
    return layout.spread(batch, scope.heads, q_positions.device)


class _Marked:
    """Marked tokens of each lane, and quick answers about the marks in an interval.

    Args:
        flags: bool ``[lanes, tokens]``.
    """

    def __init__(self, flags: Tensor) -> None:
        index = torch.arange(flags.shape[1])
        self.next = torch.where(flags, index, FAR).flip(1).cummin(1).values.flip(1)
        self.last = torch.where(flags, index, -1).cummax(1).values
        self.sum = torch.nn.functional.pad(flags.cumsum(1), (1, 0))

    def inside(self, lane: int | Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return first and last mark of intervals (inclusive), whether there is one, and whether a block is marked whole."""
        count = self.sum[lane, high + 1] - self.sum[lane, low]
        return self.next[lane, low], self.last[lane, high], count > 0, count == BLOCK


class _Builder:
    """Finds the blocks of a batch, of which all rows are laid behind one another, each filled up to whole blocks.

    A piece is what a segment has in a block; pieces of a segment follow one another.
    """

    def __init__(self, rule: Rule, segments: Sequence[Segment], batch: int, scope: Scope, rows: str) -> None:
        self.rule, self.segments, self.batch, self.is_causal = rule, segments, batch, scope.is_causal
        self.tokens, self.blocks = scope.length, -(-scope.length // BLOCK)
        stride = self.blocks * BLOCK
        lanes, total = len(rule.lanes), batch * stride
        self.position, self.segment_of = torch.zeros(2, total, dtype=torch.int64)
        real = torch.zeros(total, dtype=torch.bool)
        is_global, is_own = torch.zeros(2, lanes, total, dtype=torch.bool)
        for i, segment in enumerate(segments):
            start, length = segment.row * stride + segment.start, segment.stop - segment.start
            at = slice(start, start + length)
            self.position[at], self.segment_of[at] = torch.arange(length), i
            real[at] = True
            if segment.invalid:
                real[start + torch.tensor(segment.invalid)] = False
            for lane in range(lanes):
                for positions, has_own in rule.global_positions(i, lane):
                    is_global[lane, start + positions] = True
                    if has_own:
                        is_own[lane, start + positions] = True
        self.real, self.is_global = real, is_global & real
        self.is_reader = real & takes_part(is_own, rows)
        self._cut([s.row * stride + s.start for s in segments], [s.stop - s.start for s in segments])

    def _cut(self, starts: list[int], lengths: list[int]) -> None:
        """Cut the segments into pieces."""
        self.start, self.length = torch.tensor(starts, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64)
        first, last = self.start // BLOCK, (self.start + self.length - 1) // BLOCK
        self.segment, self.block = _expand(first, last)
        # piece of a segment in a block: this plus the block
        self.base = (last - first + 1).cumsum(0) - (last - first + 1) - first
        start, stop = self.start[self.segment], (self.start + self.length)[self.segment]
        self.low = torch.maximum(start, self.block * BLOCK)
        self.high = torch.minimum(stop, (self.block + 1) * BLOCK) - 1
        self.readers, self.keys = _Marked(self.is_reader), _Marked(self.real[None])
        self.c, self.e, self.has_key, self.is_whole = self.keys.inside(0, self.low, self.high)

    def build(self) -> Layout:
        """Return the layout."""
        heads = self.rule.scope.heads if self.rule.differs_by_head else 1
        found: list[tuple[Tensor, Tensor]] = []
        for lane, held in enumerate(self.rule.lanes):
            for band in self.rule.bands[held[0]].tolist():
                found += self._keyed(self._band(lane, *band), held, heads)
            if self.rule.has_globals:
                for pairs in self._globals(lane):
                    found += self._keyed(pairs, held, heads)
        for table, size, first in zip(self.rule.tables, self.rule.sizes, self._first_rows(), strict=True):
            found.append(self._table(table if heads > 1 else table[:1], size, first, heads))
        nothing = torch.empty(0, dtype=torch.int64)
        keys = torch.cat([nothing, *(key for key, _ in found)])
        is_full = torch.cat([nothing.bool(), *(full for _, full in found)])
        # a block is full where any part alone fills it
        full = torch.unique(keys[is_full])
        part = torch.unique(keys)
        part = part[~torch.isin(part, full, assume_unique=True)]
        return Layout(_block_tables(part, full, self.batch, heads, self.blocks, self.blocks), self._tags())

    def _tags(self) -> Tags:
        rows = [torch.full_like(self.position, table.shape[1] - 1) for table in self.rule.tables]
        for held, size, first in zip(rows, self.rule.sizes, self._first_rows(), strict=True):
            held[self.real] = (first[self.segment_of] + self.position // size)[self.real] if len(first) else 0

        def cut(flat: Tensor) -> Tensor:
            return flat.view(*flat.shape[:-1], self.batch, -1)[..., : self.tokens].contiguous()

        reader, is_global = (cut(t).transpose(0, 1) for t in (self.is_reader, self.is_global))
        segment, position = cut(self.segment_of), cut(self.position)
        q_segment = torch.where(reader, segment[:, None], -1)
        k_segment = torch.where(cut(self.real), segment, -2)
        return self.rule.tags(q_segment, k_segment, position, position, is_global, is_global, [cut(r) for r in rows])

    def _first_rows(self) -> list[Tensor]:
        """Return, for each table, the row at which each segment begins."""
        counts = [torch.tensor([t.shape[1] for t in stack], dtype=torch.int64) for stack in self.rule.stacks]
        return [count.cumsum(0) - count for count in counts]

    def _piece(self, segment: Tensor, token: Tensor) -> Tensor:
        return self.base[segment] + token // BLOCK

    def _keyed(self, pairs: tuple[Tensor, Tensor, Tensor], held: list[int], heads: int) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of pieces of a lane as numbers, for each of its heads or for all at once."""
        q, k, full = pairs
        return [(self._number(head, heads, q, k), full) for head in (held if heads > 1 else [0])]

    def _number(self, head: int | Tensor, heads: int, q: Tensor, k: Tensor) -> Tensor:
        row, block = self.block[q] // self.blocks, self.block[q] % self.blocks
        return ((row * heads + head) * self.blocks + block) * self.blocks + self.block[k] % self.blocks

    def _band(self, lane: int, size: int, step: int, before: int, after: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return pairs of pieces with an edge of a band, and whether every pair of their tokens is one."""
        start = self.start[self.segment]
        a, b, has_reader, is_whole = self.readers.inside(lane, self.low, self.high)
        a, b, c, e = a - start, b - start, self.c - start, self.e - start
        q = has_reader.nonzero()[:, 0]
        low, high = (a[q] // size - before) * size, (b[q] // size + after + 1) * size - 1
        last = self.length[self.segment]
        if step > BLOCK:
            # blocks between two steps hold no edge: one stretch of keys for each step
            least = (-(-(a[q] - last[q]) // step)).clamp(min=-(after // step))
            owner, steps = _expand(least, (b[q] // step).clamp(max=before // step))
            q = q[owner]
            low, high = a[q] - steps * step, b[q] - steps * step
        high = torch.minimum(high, b[q] if self.is_causal else last[q] - 1)
        low = low.clamp(min=0)
        first, final = (self._piece(self.segment[q], start[q] + at) for at in (low, high))
        owner, k = _expand(first, torch.where(low <= high, final, first - 1))
        q = q[owner]
        # distances, in blocks of the band's size, between tokens of the two pieces: all from low to high occur
        low, high = a[q] // size - e[k] // size, b[q] // size - c[k] // size
        full = (low >= -after) & (high <= before) & is_whole[q] & self.is_whole[k]
        full &= torch.tensor(step == 1) & ((e[k] <= a[q]) | (not self.is_causal))
        low, high = low.clamp(min=0 if self.is_causal else -after), high.clamp(max=before)
        has_edge = (high.div(step, rounding_mode="floor") * step >= low) & self.has_key[k]
        has_edge &= (c[k] <= b[q]) | (not self.is_causal)
        return q[has_edge], k[has_edge], full[has_edge]

    def _globals(self, lane: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return pairs of pieces with an edge to or from a global token, and whether every pair of their tokens is one."""
        a, b, has_reader, _ = self.readers.inside(lane, self.low, self.high)
        columns, rows = _Marked(self.is_global[lane][None]), _Marked((self.is_global & self.is_reader)[lane][None])
        every = torch.arange(len(self.start))
        begin, end = self._piece(every, self.start), self._piece(every, self.start + self.length - 1)
        _, top, has_row, is_all_rows = rows.inside(0, self.low, self.high)
        q = has_row.nonzero()[:, 0]
        owner, k = _expand(begin[self.segment[q]], q if self.is_causal else end[self.segment[q]])
        q = q[owner]
        held = self.has_key[k] & ((self.c[k] <= top[q]) | (not self.is_causal))
        row_pairs = q[held], k[held], (is_all_rows[q] & self._is_clear(a, q, k))[held]
        least, _, has_column, is_all_columns = columns.inside(0, self.low, self.high)
        k = has_column.nonzero()[:, 0]
        owner, q = _expand(k if self.is_causal else begin[self.segment[k]], end[self.segment[k]])
        k = k[owner]
        held = has_reader[q] & ((least[k] <= b[q]) | (not self.is_causal))
        is_whole = self.readers.inside(lane, self.low, self.high)[3]
        return [row_pairs, (q[held], k[held], (is_all_columns[k] & is_whole[q] & self._is_clear(a, q, k))[held])]

    def _is_clear(self, a: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Say where a whole block of keys has no key ahead of a query, as far as that matters."""
        return self.is_whole[k] & ((self.e[k] <= a[q]) | (not self.is_causal))

    def _table(self, table: Tensor, size: int, first_rows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Return numbered pairs of pieces with an edge of a table, and whether every pair of their tokens is one."""
        head, row, column = (table >= 0).nonzero().unbind(1)
        segment = torch.bucketize(row, first_rows, right=True) - 1
        last = self.length[segment] - 1
        q_low, k_low = (row - first_rows[segment]) * size, table[head, row, column] * size
        held = (k_low <= last) & ((k_low <= q_low) | (not self.is_causal))
        head, segment, last, q_low, k_low = (t[held] for t in (head, segment, last, q_low, k_low))
        start = self.start[segment]
        spans = [(start + low, start + torch.minimum(low + size - 1, last)) for low in (q_low, k_low)]
        (q_low, q_high), (k_low, k_high) = spans
        owner, q = _expand(self._piece(segment, q_low), self._piece(segment, q_high))
        again, k = _expand(*(self._piece(segment, at)[owner] for at in (k_low, k_high)))
        q, owner = q[again], owner[again]
        lane_of = torch.zeros(self.rule.scope.heads, dtype=torch.int64)
        for lane, members in enumerate(self.rule.lanes):
            lane_of[members] = lane
        a, b, has_reader, is_whole = self.readers.inside(
            lane_of[head[owner]], torch.maximum(self.low[q], q_low[owner]), torch.minimum(self.high[q], q_high[owner])
        )
        c, e, has_key, is_whole_key = self.keys.inside(
            0, torch.maximum(self.low[k], k_low[owner]), torch.minimum(self.high[k], k_high[owner])
        )
        held = has_reader & has_key & ((c <= b) | (not self.is_causal))
        full = is_whole & is_whole_key & ((e <= a) | (not self.is_causal))
        return self._number(head[owner] if heads > 1 else 0, heads, q, k)[held], full[held]


def _expand(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return all numbers of ranges (inclusive), and for each the range that it is from."""
    count = (last - first + 1).clamp(min=0)
    owner = torch.repeat_interleave(count)
    return owner, first[owner] + torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]


def _block_tables(
    part: Tensor, full: Tensor, batch: int, heads: int, q_blocks: int, k_blocks: int
) -> tuple[Tensor, ...]:
    """Return the four tables of ``Layout`` from ascending numbers ``((row * heads + head) * q_blocks + q) * k_blocks + k``."""

    def table(numbers: Tensor, lines: int, columns: int) -> tuple[Tensor, Tensor]:
        line = numbers // columns
        counts = torch.bincount(line, minlength=batch * heads * lines)
        # at least two columns: torch.compile takes sizes of 0 and 1 for constants
        indices = torch.zeros(len(counts), max(2, int(counts.max())), dtype=torch.int32)
        indices[line, torch.arange(len(numbers)) - (counts.cumsum(0) - counts)[line]] = (numbers % columns).int()
        return counts.int().view(batch, heads, lines), indices.view(batch, heads, lines, -1)

    def turned(numbers: Tensor) -> Tensor:
        line, k = numbers // k_blocks, numbers % k_blocks
        return ((line // q_blocks * k_blocks + k) * q_blocks + line % q_blocks).sort().values

    by_query = [table(numbers, q_blocks, k_blocks) for numbers in (part, full)]
    by_key = [table(turned(numbers), k_blocks, q_blocks) for numbers in (part, full)]
    return tuple(t for pair in (*by_query, *by_key) for t in pair)
