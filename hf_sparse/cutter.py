"""Cutting: the parts of one group of heads become tiles, runs and gathers that do not overlap."""

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Globals, Listed, Part, Patches, Scope, Window, can_see
from hf_sparse.tables import join_blocks, own_blocks, stretches
from hf_sparse.tiles import KEPT_MASK, Gather, Group, Mask, Run, Tile

# score elements of one kernel call: bounds the memory of backends that hold scores
MAX_SCORES = 1 << 21
# of one call over blocks, whose scores are to stay in the cache where a backend holds them
BLOCK_SCORES = 1 << 20


def covers_all(part: Part, scope: Scope) -> bool:
    """Say whether a part alone allows every pair (if causal, every pair that causality leaves)."""
    if scope.nodes:
        return False
    last = scope.length - 1
    if isinstance(part, Window):
        behind = part.before is None or part.before >= last
        ahead = scope.is_causal or part.after is None or part.after >= last
        return part.dilation == 1 and behind and ahead
    if isinstance(part, BlockWindow):
        last_block = last // part.block * part.block
        return not part.offset and part.before >= last_block and (scope.is_causal or part.after > last - part.block)
    return False


class Cutter:
    """Cuts the parts of one group of heads."""

    def __init__(self, parts: list[Part], heads: tuple[int, ...], scope: Scope, invalid: tuple[int, ...]) -> None:
        self.n, self.total, self.is_causal, self.heads = scope.length, scope.total, scope.is_causal, heads
        self.tokens = scope.length if scope.nodes else None
        self.is_invalid, self.is_column, self.is_global, self.has_own = torch.zeros(4, self.total, dtype=torch.bool)
        self.is_invalid[list(invalid)] = True
        for part in parts:
            if isinstance(part, Globals):
                held = [p for p in part.positions if p < self.total]
                self.is_column[held] = True
                self.is_global[held] |= part.reads_all
                self.has_own[held] |= part.has_projections
        # windows come first: what they cover is known from the distance alone, so blocks after them keep one mask
        order: list[type[Part]] = [Window, BlockWindow, BlockTable, Listed, Patches]
        self.parts = sorted(
            (p for p in parts if not isinstance(p, Globals)),
            key=lambda p: next(i for i, kind in enumerate(order) if isinstance(p, kind)),
        )
        full = [part for part in self.parts if covers_all(part, scope)]
        self.is_full = bool(full)
        if full:
            self.parts = full[:1]
        # causal blocks would need a mask each once they are joined
        joined = None if self.is_full or self.is_causal or self.tokens else join_blocks(self.parts, self.is_column)
        self.has_columns = not self.is_full and joined is None
        if joined is not None:
            self.parts = [joined]
        self.is_excluded = self.is_invalid | self.is_column if self.has_columns else self.is_invalid

    def build(self, rows: str) -> Group:
        work: list[Tile | Run | Gather] = []
        if rows != "own":
            for i, part in enumerate(self.parts):
                if isinstance(part, BlockTable):
                    work += self._table_work(part, self.parts[:i])
                elif isinstance(part, Listed):
                    work += self._list_work(part, self.parts[:i])
                elif isinstance(part, Patches):
                    work += self._patch_work(part, self.parts[:i])
                else:
                    # the slices at the borders first: what a backend runs head by head is then one stretch
                    work += sorted(self._window_work(part, self.parts[:i]), key=lambda piece: isinstance(piece, Run))
            if self.has_columns:
                work += self._column_tiles(is_first=not self.parts)
            if not self.is_full:
                work += self._row_tiles(self.is_global if rows == "all" else self.is_global & ~self.has_own)
        else:
            work += self._row_tiles(self.has_own)
        overwritten = torch.zeros_like(self.is_global) if self.is_full else self.is_global
        return Group(self.heads, tuple(work), overwritten.nonzero()[:, 0], self.is_invalid.nonzero()[:, 0])

    def _rule(self, part: Part, earlier: Sequence[Part], q: Tensor, k: Tensor, head: int = 0) -> Tensor:
        """Return bool ``[..., T, S]``: edges of this part that no earlier part has; q ``[..., T]``, k ``[..., S]``."""
        q, k = q[..., :, None], k[..., None, :]
        mask = self._allows(part, q, k, head)
        for other in earlier:
            mask = mask & ~self._allows(other, q, k, head)
        mask = mask & ~self.is_excluded[k]
        return mask & can_see(q, k, self.tokens) if self.is_causal else mask

    def _allows(self, part: Part, q: Tensor, k: Tensor, head: int) -> Tensor:
        allowed = part.allows(q, k)
        allowed = allowed[head] if allowed.shape[0] > 1 else allowed[0]
        return allowed if self.tokens is None or part.has_nodes else allowed & (q < self.tokens) & (k < self.tokens)

    def _window_work(self, part: Part, earlier: Sequence[Part]) -> Iterator[Tile | Run]:
        if isinstance(part, Window):
            for offset in range(min(part.dilation, self.n)):
                tokens = -(-(self.n - offset) // part.dilation)
                back = tokens - 1 if part.before is None else min(part.before, tokens - 1)
                ahead = tokens - 1 if part.after is None else min(part.after, tokens - 1)
                ahead = 0 if self.is_causal else ahead
                block = _window_block(tokens, back + ahead)
                yield from self._blocks(part, earlier, offset, part.dilation, block, back, ahead)
        elif isinstance(part, BlockWindow):
            block = min(part.block, self.n)
            ahead = 0 if self.is_causal else min(part.after, self.n)
            if part.offset < self.n:
                yield from self._blocks(part, earlier, part.offset, 1, block, min(part.before, self.n), ahead)

    def _blocks(
        self, part: Part, earlier: Sequence[Part], offset: int, step: int, block: int, back: int, ahead: int
    ) -> Iterator[Tile | Run]:
        """Cut ``tokens[offset::step]`` into blocks of queries, each against the keys around it."""
        excluded = self.is_excluded[offset : self.n : step]
        tokens, width = len(excluded), back + block + ahead
        shared = [False] * -(-tokens // block)
        if all(isinstance(other, Window) for other in earlier) and block * width <= MAX_SCORES:
            shared = _alike(excluded, block, back, width)
        # a stretch of fewer blocks than two in each piece whose windows lie apart runs block by block, for many heads at once
        shortest = 2 * -(-width // block)
        run_mask: Mask | str | None = "unknown"
        i = 0
        while i < len(shared):
            first = i * block
            if not shared[i]:
                yield from self._trimmed(part, earlier, offset, step, first, min(first + block, tokens), back, ahead)
                i += 1
                continue
            stop = i
            while stop < len(shared) and shared[stop]:
                stop += 1
            if isinstance(run_mask, str):
                q = offset + step * torch.arange(first, first + block)
                k = offset + step * torch.arange(first - back, first - back + width)
                run_mask = _mask_unless_full(self._rule(part, earlier, q, k))
            if stop - i >= shortest:
                yield Run(offset, step, first, stop - i, block, block, back, width, run_mask, not earlier)
            else:
                for a in range(first, stop * block, block):
                    at = [
                        slice(offset + step * b, offset + step * (b + n - 1) + 1, step)
                        for b, n in ((a, block), (a - back, width))
                    ]
                    yield Tile(at[0], at[1], run_mask, not earlier)
            i = stop

    def _trimmed(
        self, part: Part, earlier: Sequence[Part], offset: int, step: int, first: int, end: int, back: int, ahead: int
    ) -> Iterator[Tile]:
        """Cut one block of queries at the borders of the sequence, in slices of at most ``MAX_SCORES`` scores."""
        tokens = -(-(self.n - offset) // step)
        block_size = part.block if isinstance(part, BlockWindow) else 0
        low = max(0, first - back)
        high = min(tokens, (first + block_size if block_size else end) + ahead)
        # the diagonal block of a long causal row is cut off, so that what is before it needs no mask
        cuts = [(low, high)]
        if self.is_causal and end - low > 2 * (end - first) and self.is_full:
            cuts = [(low, first), (first, end)]
        for part_low, part_high in cuts:
            rows = max(1, min(end - first, MAX_SCORES // max(part_high - part_low, 1)))
            for a in range(first, end, rows):
                b = min(a + rows, end)
                q = offset + step * torch.arange(a, b)
                k = offset + step * torch.arange(part_low, part_high)
                mask = self._lazy_mask(part, earlier, q, k)
                q_slice = _every(offset, step, a, b - a)
                k_slice = _every(offset, step, part_low, part_high - part_low)
                yield Tile(q_slice, k_slice, mask, not earlier and part_low == low)

    def _lazy_mask(self, part: Part, earlier: Sequence[Part], q: Tensor, k: Tensor) -> Mask | None:
        if self.is_full and not self.is_causal and not self.is_excluded.any():
            return None
        if len(q) * len(k) <= KEPT_MASK:
            return _mask_unless_full(self._rule(part, earlier, q, k))
        return Mask(lambda: self._rule(part, earlier, q, k))

    def _patch_work(self, part: Patches, earlier: Sequence[Part]) -> Iterator[Tile]:
        for queries, keys in part.patches():
            held = keys[~self.is_excluded[keys]]
            if self.is_causal:
                held = held[can_see(queries.max(), held, self.tokens)]
            for q in queries.split(max(1, MAX_SCORES // max(len(held), 1))) if len(held) else ():
                yield Tile(_as_slice(q), _as_slice(held), self._lazy_mask(part, earlier, q, held), not earlier)

    def _list_work(self, part: Listed, earlier: Sequence[Part]) -> Iterator[Gather]:
        for first, block, keys in part.lists():
            step = max(1, BLOCK_SCORES // (block * keys.shape[1]))
            for row in range(0, len(keys), step):
                held, q = keys[row : row + step], first + row * block + torch.arange(block * step)
                q = q[: block * len(held)].view(-1, block)
                for heads, head in self._table_heads(earlier):

                    def make(held: Tensor = held, q: Tensor = q, head: int = head) -> Tensor:
                        return self._rule(part, earlier, q, held.clamp(min=0), head) & (held >= 0)[:, None]

                    # many heads use a mask, and it takes long to make
                    mask = None if bool(make().all()) else Mask(make, keep=BLOCK_SCORES)
                    yield Gather(heads, int(q[0, 0]), block, held.clamp(min=0), 1, mask, not earlier)

    def _table_heads(self, parts: Sequence[Part]) -> list[tuple[tuple[int, ...], int]]:
        """Return heads, counted within the group, that have the same tables, each with a head of the layer that shows them."""
        if any(isinstance(part, BlockTable) and part.table.shape[0] > 1 for part in parts):
            return [((i,), head) for i, head in enumerate(self.heads)]
        return [(tuple(range(len(self.heads))), 0)]

    def _table_work(self, part: BlockTable, earlier: Sequence[Part]) -> Iterator[Gather]:
        for heads, head in self._table_heads((part, *earlier)):
            yield from self._table_rows(part, earlier, heads, head)

    def _table_rows(
        self, part: BlockTable, earlier: Sequence[Part], heads: tuple[int, ...], head: int
    ) -> Iterator[Gather]:
        size, is_first = part.block, not earlier
        table, earlier = own_blocks(part, earlier, self.n, head, is_causal=self.is_causal)
        for start, stop, blocks in stretches(table, self.n, size):
            width = blocks.shape[1] * size
            # many blocks of queries at once, or a block in slices where even one is too large
            step = max(1, BLOCK_SCORES // (size * width))
            slice_ = min(size, max(1, MAX_SCORES // width))
            for row in range(start, stop, step if slice_ == size else 1):
                entries = blocks[row - start : row - start + step] if slice_ == size else blocks[row - start][None]
                end = min((row + len(entries)) * size, self.n)
                for first in range(row * size, end, len(entries) * slice_):
                    block = min(slice_, (end - first) // len(entries))
                    yield self._gather(heads, head, earlier, entries, size, first, block, is_first)

    def _gather(
        self,
        heads: tuple[int, ...],
        head: int,
        earlier: Sequence[Part],
        entries: Tensor,
        size: int,
        first: int,
        block: int,
        is_first: bool,
    ) -> Gather:
        """Make the work of consecutive blocks of queries against the blocks of keys ``[blocks, W]``."""
        positions = (entries[:, :, None] * size + torch.arange(size)).flatten(1)
        is_real = (entries >= 0)[:, :, None].expand(-1, -1, size).flatten(1) & (positions < self.n)
        is_whole = bool((positions < self.n).all())
        positions = positions.clamp(0, self.n - 1)
        is_real &= ~self.is_excluded[positions]
        q = first + torch.arange(len(entries) * block).view(-1, block)

        def make() -> Tensor:
            mask = is_real[:, None, :].expand(-1, block, -1)
            for other in earlier:
                mask = mask & ~self._allows(other, q[:, :, None], positions[:, None, :], head)
            return mask & (positions[:, None, :] <= q[:, :, None]) if self.is_causal else mask

        needs_mask = bool(earlier) or not bool(is_real.all())
        needs_mask |= self.is_causal and bool((positions.amax(1) > q[:, 0]).any())
        # whole blocks are named by one index each
        index, unit = (entries.clamp(min=0), size) if is_whole else (positions, 1)
        return Gather(heads, first, block, index, unit, Mask(make) if needs_mask else None, is_first)

    def _column_tiles(self, *, is_first: bool) -> Iterator[Tile]:
        columns = (self.is_column & ~self.is_invalid).nonzero()[:, 0]
        if not len(columns):
            return
        step = max(64, min(4096, MAX_SCORES // len(columns)))
        # many columns in small steps: those that lie ahead are left out
        step = min(step, 512) if self.is_causal and len(columns) > 64 else step
        for a in range(0, self.total, step):
            q = torch.arange(a, min(a + step, self.total))
            mask, held = None, columns
            if self.is_causal:
                held = columns[can_see(q[-1], columns, self.tokens)]
                mask = None if can_see(q[0], held, self.tokens).all() else Mask(functools.partial(self._seen, q, held))
            if len(held):
                yield Tile(slice(a, a + len(q)), _as_slice(held), mask, is_first)

    def _seen(self, q: Tensor, k: Tensor) -> Tensor:
        return can_see(q[:, None], k[None, :], self.tokens)

    def _row_tiles(self, is_row: Tensor) -> Iterator[Tile]:
        rows = (is_row & ~self.is_invalid).nonzero()[:, 0]
        keys = torch.arange(self.total)
        step = max(8, min(256, MAX_SCORES // self.total))
        for q in rows.split(step) if len(rows) else ():
            needs_mask = self.is_causal or bool(self.is_invalid.any())
            mask = Mask(functools.partial(self._row_mask, q, keys)) if needs_mask else None
            yield Tile(_as_slice(q), slice(0, self.total), mask, is_first=True, is_row=True)

    def _row_mask(self, q: Tensor, k: Tensor) -> Tensor:
        mask = (~self.is_invalid).expand(len(q), -1)
        return mask & self._seen(q, k) if self.is_causal else mask


def _alike(excluded: Tensor, block: int, back: int, width: int) -> list[bool]:
    """Say of each block whether its window lies inside and leaves out the same keys as most windows do."""
    tokens = len(excluded)
    start = torch.arange(0, tokens, block)
    inside = (start >= back) & (start - back + width <= tokens) & (start + block <= tokens)
    at = inside.nonzero()[:, 0]
    if not len(at):
        return inside.tolist()
    windows = excluded[int(start[at[0]]) - back :].unfold(0, width, block)[: len(at)]
    # nearly all windows leave out none, or each leaves out the same ones
    reference = windows[windows.sum(1).median(0).indices]
    inside[at] = (windows == reference).all(1)
    return inside.tolist()


def _window_block(tokens: int, reach: int) -> int:
    """Return the queries of a block for a window that reads ``reach`` keys beside the query."""
    if reach >= 2 * (tokens - 1):
        return min(tokens, 256)
    # larger blocks read more than they need, but a short sequence has too few small ones
    return min(tokens, 128 if reach >= 256 and tokens <= 2048 else 64)


def _every(offset: int, step: int, first: int, count: int) -> slice:
    """Return ``count`` tokens of ``tokens[offset::step]`` from ``first`` on, as a slice of all tokens."""
    return slice(offset + step * first, offset + step * (first + count - 1) + 1, step)


def _mask_unless_full(mask: Tensor) -> Mask | None:
    return None if bool(mask.all()) else Mask(lambda: mask)


def _as_slice(positions: Tensor) -> slice | Tensor:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
