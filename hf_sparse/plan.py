"""Plans: the parts of a pattern cut into tiles of work that a backend runs one after another.

Tiles of different parts are disjoint: a later part gives up the edges of earlier ones. Building a plan costs
O(blocks read).
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sparse.cutter import MAX_SCORES, Cutter
from hf_sparse.parts import BlockTable, Part, Scope, edge_mask
from hf_sparse.tiles import Group, Mask, MaskByHead, Plan, Tile


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
    groups = [Cutter(held, heads, scope, invalid).build(rows) for held, heads in _by_parts(parts, scope.heads)]
    return Plan(scope.total, tuple(groups))


def make_whole_plan(parts: Sequence[Part], scope: Scope, *, invalid: tuple[int, ...] = (), rows: str = "all") -> Plan:
    """Put a short sequence into one tile under its whole mask, or under none where every pair is an edge.

    Arguments as for ``make_plan``.
    """
    position = torch.arange(scope.total)
    is_real = torch.ones(scope.total, dtype=torch.bool)
    is_real[list(invalid)] = False
    nothing = torch.empty(0, dtype=torch.int64)
    everything = slice(0, scope.total)
    groups = []
    for held, heads in _by_parts(parts, scope.heads):
        # heads that differ are drawn together, since each has its row of a table
        tables = [part.block for part in held if isinstance(part, BlockTable) and part.table.shape[0] > 1]
        drawn = edge_mask(
            tuple(parts) if tables else tuple(dataclasses.replace(part, heads=None) for part in held),
            position[:, None],
            position[None, :],
            heads=scope.heads if tables else 1,
            is_causal=scope.is_causal,
            rows=rows,
            tokens=scope.length if scope.nodes else None,
        )
        if invalid:
            drawn &= is_real[:, None] & is_real
        if tables and len(heads) < scope.heads:
            drawn = drawn[list(heads)]
        mask: Mask | None = None
        if not drawn.all():
            # a view: it is drawn already
            mask = MaskByHead(drawn[None], tables[0]) if tables else Mask(drawn[0].detach, keep=drawn.numel())
        groups.append(Group(heads, (Tile(everything, everything, mask, True),), nothing, nothing))
    return Plan(scope.total, tuple(groups))


# the longest sequence that may run whole
MOST_WHOLE = 1024
# measured on two CPU cores, in scores of dense attention: a score of a whole sequence under the mask of all heads, and under
# one of each head; of blocks that lie beside the query, and of blocks named by index; what else a query of a head, a call, and
# all of them together take. `make bench` shows what comes of it.
WHOLE_COST, WHOLE_COST_BY_HEAD = 1.07, 1.25
SCORE_COST, GATHER_COST, QUERY_COST, CALL_COST, OUTER_COST = 1.25, 1.9, 220, 10_000, 150_000


def is_faster_whole(plan: Plan, heads: int) -> bool:
    """Say whether a sequence runs faster in one tile than in the tiles of a plan."""
    if plan.length > MOST_WHOLE:
        return False
    scores, gathered, calls = plan.count_work()
    cost = SCORE_COST * (scores - gathered) + GATHER_COST * gathered + CALL_COST * calls + OUTER_COST
    cost += QUERY_COST * heads * plan.length
    whole = WHOLE_COST_BY_HEAD if plan.differs_by_head else WHOLE_COST
    return whole * heads * plan.length**2 < cost


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
