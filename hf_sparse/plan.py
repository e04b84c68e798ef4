"""Plans: the parts of a pattern cut into tiles of work that a backend runs one after another.

Tiles of different parts are disjoint: a later part gives up the edges of earlier ones. Building a plan costs
O(blocks read).
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Globals, Part, Scope, Window, edge_mask
from hf_sparse.tables import join_blocks, own_blocks, stretches
from hf_sparse.tiles import KEPT_MASK, Gather, Group, Mask, Plan, Run, Tile

# score elements of one kernel call: bounds the memory of backends that hold scores
MAX_SCORES = 1 << 21
# of one call over blocks, whose scores are to stay in the cache where a backend holds them
BLOCK_SCORES = 1 << 20


def make_plan(parts: Sequence[Part], scope: Scope, *, invalid: tuple[int, ...] = (), rows: str = "all") -> Plan:
    """Cut parts into tiles.

    Args:
        parts: the parts of a pattern for this scope.
        scope: length, heads and causality.
        invalid: positions that are no real tokens: nobody reads them.
        rows: "all" rows; "shared", without those of global tokens that have projections of their own (what they get is to be
            overwritten); or "own", only those.

    Returns:
        The plan. Tiles of different parts are disjoint: a later part gives up the edges of earlier ones.
    """
    groups = [_GroupBuilder(held, heads, scope, invalid).build(rows) for held, heads in _by_parts(parts, scope.heads)]
    return Plan(scope.length, tuple(groups))


def make_whole_plan(parts: Sequence[Part], scope: Scope, *, invalid: tuple[int, ...] = (), rows: str = "all") -> Plan:
    """Put a short sequence into one tile under its whole mask, or under none where every pair is an edge.

    Arguments as for ``make_plan``.
    """
    position = torch.arange(scope.length)
    is_real = torch.ones(scope.length, dtype=torch.bool)
    is_real[list(invalid)] = False
    nothing = torch.empty(0, dtype=torch.int64)
    everything = slice(0, scope.length)
    groups = []
    for held, heads in _by_parts(parts, scope.heads):
        differ = any(isinstance(part, BlockTable) and part.table.shape[0] > 1 for part in held)

        def draw(held: list[Part] = held, heads: tuple[int, ...] = heads, differ: bool = differ) -> Tensor:
            drawn = edge_mask(
                tuple(parts) if differ else tuple(dataclasses.replace(part, heads=None) for part in held),
                position[:, None],
                position[None, :],
                heads=scope.heads if differ else 1,
                is_causal=scope.is_causal,
                rows=rows,
            )
            return (drawn[list(heads)][None] if differ else drawn[0]) & is_real[:, None] & is_real

        drawn = draw()
        mask = None if bool(drawn.all()) else Mask(draw, keep=drawn.numel(), is_compact=differ)
        if mask is not None and differ:
            mask.adopt(drawn)
        groups.append(Group(heads, (Tile(everything, everything, mask, True),), nothing, nothing))
    return Plan(scope.length, tuple(groups))


# the longest sequence that may run whole
MOST_WHOLE = 1024
# measured on two CPU cores, in scores of dense attention: a score of a whole sequence under its mask, of blocks that lie beside
# the query, of blocks named by index; and a call. `make bench` shows what comes of it.
WHOLE_COST, SCORE_COST, GATHER_COST, CALL_COST = 1.15, 1.3, 2.2, 60_000


def is_faster_whole(plan: Plan, heads: int) -> bool:
    """Say whether a sequence runs faster in one tile than in the tiles of a plan."""
    if plan.length > MOST_WHOLE:
        return False
    scores, gathered, calls = plan.count_work()
    cost = SCORE_COST * (scores - gathered) + GATHER_COST * gathered + CALL_COST * calls
    return WHOLE_COST * heads * plan.length**2 < cost


def covers_all(part: Part, scope: Scope) -> bool:
    """Say whether a part alone allows every pair (if causal, every pair that causality leaves)."""
    last = scope.length - 1
    if isinstance(part, Window):
        behind = part.before is None or part.before >= last
        ahead = scope.is_causal or part.after is None or part.after >= last
        return part.dilation == 1 and behind and ahead
    if isinstance(part, BlockWindow):
        last_block = last // part.block
        return part.before >= last_block and (scope.is_causal or part.after >= last_block)
    return False


def _by_parts(parts: Sequence[Part], heads: int) -> list[tuple[list[Part], tuple[int, ...]]]:
    """Return the parts that heads share, and the heads."""
    by_parts: dict[tuple[int, ...], list[int]] = {}
    for head in range(heads):
        held = tuple(i for i, part in enumerate(parts) if part.heads is None or head in part.heads)
        by_parts.setdefault(held, []).append(head)
    return [([parts[i] for i in held], tuple(of_held)) for held, of_held in by_parts.items()]


def make_positional_plan(
    parts: Sequence[Part],
    scope: Scope,
    q_positions: Tensor,
    k_positions: Tensor,
    is_real: Tensor,
    *,
    rows: str = "all",
) -> Plan:
    """Cut attention of a few queries over many keys into tiles, for positions of any order, as in cached decoding.

    Args:
        parts: the parts of a pattern for this scope.
        scope: length, heads and causality.
        q_positions: int64 ``[T]``, logical positions of the queries.
        k_positions: int64 ``[S]``, logical positions of the keys.
        is_real: bool ``[S]``; False where nobody reads the key.
        rows: as for ``make_plan``.

    Returns:
        A plan whose tiles hold slices of the queries against all keys.
    """
    step = max(1, min(256, MAX_SCORES // max(len(k_positions) * scope.heads, 1)))

    def mask_of(q: Tensor) -> Tensor:
        mask = edge_mask(
            tuple(parts), q[:, None], k_positions[None, :], heads=scope.heads, is_causal=scope.is_causal, rows=rows
        )
        return (mask & is_real)[None]

    work = [
        Tile(slice(a, a + step), slice(0, len(k_positions)), Mask(lambda a=a: mask_of(q_positions[a : a + step])), True)  # type: ignore[misc]
        for a in range(0, len(q_positions), step)
    ]
    nothing = torch.empty(0, dtype=torch.int64)
    group = Group(tuple(range(scope.heads)), tuple(work), nothing, nothing)
    return Plan(len(q_positions), (group,))


class _GroupBuilder:
    """Cuts the parts of one group of heads."""

    def __init__(self, parts: list[Part], heads: tuple[int, ...], scope: Scope, invalid: tuple[int, ...]) -> None:
        self.n, self.is_causal, self.heads = scope.length, scope.is_causal, heads
        self.is_invalid = torch.zeros(self.n, dtype=torch.bool)
        self.is_invalid[list(invalid)] = True
        self.is_global = torch.zeros(self.n, dtype=torch.bool)
        self.has_own = torch.zeros(self.n, dtype=torch.bool)
        for part in parts:
            if isinstance(part, Globals):
                held = [p for p in part.positions if p < self.n]
                self.is_global[held] = True
                self.has_own[held] |= part.has_projections
        # windows come first: what they cover is known from the distance alone, so blocks after them keep one mask
        order: list[type[Part]] = [Window, BlockWindow, BlockTable]
        self.parts = sorted((p for p in parts if not isinstance(p, Globals)), key=lambda p: order.index(type(p)))
        full = [part for part in self.parts if covers_all(part, scope)]
        self.is_full = bool(full)
        if full:
            self.parts = full[:1]
        # causal blocks would need a mask each once they are joined
        joined = None if self.is_full or self.is_causal else join_blocks(self.parts, self.is_global)
        self.has_columns = not self.is_full and joined is None
        if joined is not None:
            self.parts = [joined]
        self.is_excluded = self.is_invalid | self.is_global if self.has_columns else self.is_invalid

    def build(self, rows: str) -> Group:
        work: list[Tile | Run | Gather] = []
        if rows != "own":
            for i, part in enumerate(self.parts):
                if isinstance(part, BlockTable):
                    work += self._table_work(part, self.parts[:i])
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
        mask = _on_head(part.allows(q, k), head)
        for other in earlier:
            mask = mask & ~_on_head(other.allows(q, k), head)
        mask = mask & ~self.is_excluded[k]
        return mask & (k <= q) if self.is_causal else mask

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
            ahead = 0 if self.is_causal else part.after * block
            yield from self._blocks(part, earlier, 0, 1, block, part.before * block, ahead)

    def _blocks(
        self, part: Part, earlier: Sequence[Part], offset: int, step: int, block: int, back: int, ahead: int
    ) -> Iterator[Tile | Run]:
        """Cut ``tokens[offset::step]`` into blocks of queries, each against the keys around it."""
        excluded_before = torch.nn.functional.pad(self.is_excluded[offset::step].cumsum(0), (1, 0))
        tokens = len(excluded_before) - 1
        width = back + block + ahead
        start = torch.arange(0, tokens, block)
        low, high = start - back, start + block + ahead
        inside = (low >= 0) & (high <= tokens) & (start + block <= tokens)
        clean = excluded_before[high.clamp(max=tokens)] == excluded_before[low.clamp(min=0)]
        same = all(isinstance(other, Window) for other in earlier) and block * width <= MAX_SCORES
        shared = (inside & clean).tolist() if same else [False] * len(start)
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

    def _table_work(self, part: BlockTable, earlier: Sequence[Part]) -> Iterator[Gather]:
        per_head = part.table.shape[0] > 1 or any(isinstance(p, BlockTable) and p.table.shape[0] > 1 for p in earlier)
        if not per_head:
            yield from self._table_rows(part, earlier, tuple(range(len(self.heads))), 0)
            return
        for i, head in enumerate(self.heads):
            yield from self._table_rows(part, earlier, (i,), head)

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
                mask = mask & ~_on_head(other.allows(q[:, :, None], positions[:, None, :]), head)
            return mask & (positions[:, None, :] <= q[:, :, None]) if self.is_causal else mask

        needs_mask = bool(earlier) or not bool(is_real.all())
        needs_mask |= self.is_causal and bool((positions.amax(1) > q[:, 0]).any())
        # whole blocks are named by one index each
        index, unit = (entries.clamp(min=0), size) if is_whole else (positions, 1)
        return Gather(heads, first, block, index, unit, Mask(make) if needs_mask else None, is_first)

    def _column_tiles(self, *, is_first: bool) -> Iterator[Tile]:
        columns = (self.is_global & ~self.is_invalid).nonzero()[:, 0]
        if not len(columns):
            return
        step = max(64, min(4096, MAX_SCORES // len(columns)))
        for a in range(0, self.n, step):
            q = torch.arange(a, min(a + step, self.n))
            mask = Mask(lambda q=q: columns[None, :] <= q[:, None]) if self.is_causal else None  # type: ignore[misc]
            yield Tile(slice(a, a + len(q)), _as_slice(columns), mask, is_first)

    def _row_tiles(self, is_row: Tensor) -> Iterator[Tile]:
        rows = (is_row & ~self.is_invalid).nonzero()[:, 0]
        keys = torch.arange(self.n)
        step = max(8, min(256, MAX_SCORES // self.n))
        for q in rows.split(step) if len(rows) else ():
            needs_mask = self.is_causal or bool(self.is_invalid.any())
            mask = Mask(lambda q=q: self._row_mask(q, keys)) if needs_mask else None  # type: ignore[misc]
            yield Tile(_as_slice(q), slice(0, self.n), mask, is_first=True, is_row=True)

    def _row_mask(self, q: Tensor, k: Tensor) -> Tensor:
        mask = (~self.is_invalid).expand(len(q), -1)
        return mask & (k[None, :] <= q[:, None]) if self.is_causal else mask


def _window_block(tokens: int, reach: int) -> int:
    """Return the queries of a block for a window that reads ``reach`` keys beside the query."""
    if reach >= 2 * (tokens - 1):
        return min(tokens, 256)
    # larger blocks read more than they need, but a short sequence has too few small ones
    return min(tokens, 128 if reach >= 256 and tokens <= 2048 else 64)


def _every(offset: int, step: int, first: int, count: int) -> slice:
    """Return ``count`` tokens of ``tokens[offset::step]`` from ``first`` on, as a slice of all tokens."""
    return slice(offset + step * first, offset + step * (first + count - 1) + 1, step)


def _on_head(allowed: Tensor, head: int) -> Tensor:
    return allowed[head] if allowed.shape[0] > 1 else allowed[0]


def _mask_unless_full(mask: Tensor) -> Mask | None:
    return None if bool(mask.all()) else Mask(lambda: mask)


def _as_slice(positions: Tensor) -> slice | Tensor:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions
