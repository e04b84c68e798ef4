"""Slots: blocks of queries and the keys they read, chosen by content for each row and head of a sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Slots:
    """Blocks of queries, each against a block of keys.

    Attributes:
        lane: int64 ``[X]``, ascending: ``row * heads + head`` of each block.
        queries: int64 ``[X, T]``, places in the sequence; -1 holds none. A query may stand in several blocks.
        keys: int64 ``[X, S]``, likewise.
        rank: int64 ``[X]``, the round or cluster of each block, for ``Repeats``; None where there are none.
        reach: blocks whose queries, in their order, are a block's keys: those of its lane just before, -1 where there are none,
            and its own as the last; None where keys are named one by one.
    """

    lane: Tensor
    queries: Tensor
    keys: Tensor
    rank: Tensor | None = None
    reach: int | None = None


# scores of which the maximum is looked at first
_GROUP = 16

# says of some blocks of a lane, by rank [X], queries [X, T] and keys [X, S], which pairs one of lower rank has: bool [X, T, S]
Finder = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Repeats:
    """Which pairs stand together in several blocks: only the block of the lowest rank counts them."""

    def on(self, lane: int) -> Finder:
        """Return what finds them on a lane, which is ``row * heads + head``; of no token any place may be named."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Rounds(Repeats):
    """Every token is in one block of each round, and blocks of queries read those of keys up to ``reach`` behind.

    Attributes:
        queries: int32 ``[lanes, rounds, N]``, the block of each token as a query, counted within its round.
        keys: int32 ``[lanes, rounds, N]``, as a key.
        reach: blocks behind the query's own that it reads.
    """

    queries: Tensor
    keys: Tensor
    reach: int = 0

    def on(self, lane: int) -> Finder:
        q_blocks, k_blocks = self.queries[lane], self.keys[lane]

        def find(rank: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            found = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.bool, device=queries.device)
            for earlier in range(int(rank.max())):
                apart = q_blocks[earlier][queries][:, :, None] - k_blocks[earlier][keys][:, None, :]
                is_pair = apart == 0 if not self.reach else (apart >= 0) & (apart <= self.reach)
                found |= is_pair & (rank > earlier)[:, None, None]
            return found

        return find


@dataclass(frozen=True, eq=False)
class Memberships(Repeats):
    """A token may be in any number of clusters, of which the rank is the place.

    Attributes:
        queries: int64 ``[lanes, C, T]``, the tokens of each cluster as queries.
        keys: int64 ``[lanes, C, S]``, as keys.
        tokens: of the sequence.
    """

    queries: Tensor
    keys: Tensor
    tokens: int

    def on(self, lane: int) -> Finder:
        clusters = torch.arange(self.queries.shape[1], device=self.queries.device)

        def indicators(at: Tensor) -> Tensor:
            held = torch.zeros(self.tokens, len(clusters), device=at.device)
            return held.index_put_((at, clusters[:, None]), torch.ones((), device=at.device))

        q_is_in, k_is_in = indicators(self.queries[lane]), indicators(self.keys[lane])

        def find(rank: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
            # how many clusters they share: a product, which is many times as fast as comparing
            last = int(rank.max())
            held = q_is_in[:, :last][queries] * (clusters[:last] < rank[:, None])[:, None]
            return (held @ k_is_in[:, :last][keys].transpose(1, 2)) > 0

        return find


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who reads whom on some rows of one sequence, by content.

    Attributes:
        slots: the blocks.
        repeats: which pairs stand in several blocks, so that each counts once; None where none does, or where each counts as
            often as it stands there.
        is_mean: whether a query's outputs of several blocks are averaged, each with a softmax of its own; if not, all its keys
            share one softmax.
        reads_self: whether a query that stands beside itself reads itself.
        chosen: tokens of the blocks that were chosen, each by shares: of the keys of a lane, in parts as many as it has places,
            a block stands first in each. 0 where there are no shares.
        copies: int64 ``[lanes, S - N]``, which token each key behind the N tokens is a copy of; None where none is.
    """

    slots: tuple[Slots, ...]
    repeats: Repeats | None = None
    is_mean: bool = False
    reads_self: bool = True
    chosen: int = 0
    copies: Tensor | None = None


def cut(order: Tensor, size: int) -> Tensor:
    """Cut places into blocks.

    Args:
        order: int64 ``[..., N]``.
        size: places of a block.

    Returns:
        int64 ``[..., blocks, size]``, the last filled up with -1.
    """
    blocks = -(-order.shape[-1] // size)
    filled = torch.nn.functional.pad(order, (0, blocks * size - order.shape[-1]), value=-1)
    return filled.unflatten(-1, (blocks, size))


def of_rounds(queries: Tensor, keys: Tensor, reach: int | None = None) -> tuple[Slots, ...]:
    """Return blocks of rounds, int64 ``[lanes, rounds, blocks, T]`` and ``[lanes, rounds, blocks, S]``, round by round."""
    lanes, rounds, blocks, _ = queries.shape
    lane = torch.arange(lanes, device=queries.device).repeat_interleave(blocks)
    return tuple(
        Slots(lane, queries[:, i].flatten(0, 1), keys[:, i].flatten(0, 1), torch.full_like(lane, i), reach)
        for i in range(rounds)
    )


def ragged(q_groups: Tensor, k_groups: Tensor, block: int) -> tuple[Slots, ...]:
    """Let the queries of each group read the keys of the same group, however large the groups are.

    Args:
        q_groups: int64 ``[lanes, N]``, the group of each token as a query, at least 0.
        k_groups: int64 ``[lanes, N]``, as a key.
        block: queries of a block.

    Returns:
        Blocks of queries of one group; those whose groups have about as many keys are held together.
    """
    lanes, tokens = q_groups.shape
    groups = int(torch.maximum(q_groups.max(), k_groups.max())) + 1
    offset = torch.arange(lanes, device=q_groups.device)[:, None] * groups
    (q_order, q_first, q_count), (k_order, k_first, k_count) = (
        _sorted(ids + offset, lanes * groups) for ids in (q_groups, k_groups)
    )
    blocks = torch.where(k_count > 0, -(-q_count // block), 0)
    group = torch.arange(lanes * groups, device=blocks.device).repeat_interleave(blocks)
    # the place of each block among those of its group
    nth = torch.arange(len(group), device=blocks.device) - (blocks.cumsum(0) - blocks)[group]
    first = q_first[group] + nth * block
    count = (q_count[group] - nth * block).clamp(max=block)
    widths = 2 ** torch.arange(4, 64, device=blocks.device).to(torch.float64)
    kind = torch.bucketize(k_count[group].double(), widths)
    found = []
    for name in kind.unique().tolist():
        at = (kind == name).nonzero()[:, 0]
        own = group[at]
        width = int(k_count[own].max())
        queries = _listed(q_order, first[at], count[at], int(count[at].max()))
        keys = _listed(k_order, k_first[own], k_count[own], width)
        queries, keys = (torch.where(held >= 0, held % tokens, -1) for held in (queries, keys))
        found.append(Slots(own // groups, queries, keys))
    return tuple(found)


def _sorted(ids: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return places sorted by id, and the first of each id and how many there are."""
    flat = ids.flatten()
    counts = torch.bincount(flat, minlength=total)
    return torch.argsort(flat, stable=True), counts.cumsum(0) - counts, counts


def _listed(order: Tensor, first: Tensor, count: Tensor, width: int) -> Tensor:
    """Return stretches of an order, int64 ``[X, width]``, filled up with -1."""
    step = torch.arange(width, device=order.device)
    at = (first[:, None] + step).clamp(max=len(order) - 1)
    return order[at].masked_fill(step >= count[:, None], -1)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the largest scores.

    Args:
        scores: float ``[..., N]``.
        count: how many, at most N.

    Returns:
        int64 ``[..., count]``, ascending; of equal scores any.
    """
    tokens = scores.shape[-1]
    groups = tokens // _GROUP
    if groups < 4 * count:
        return scores.topk(count, dim=-1, sorted=False).indices.sort(-1).values
    # the largest are in the groups whose maxima are largest: far fewer scores are sorted
    rest = tokens - groups * _GROUP
    grouped = scores[..., : tokens - rest].unflatten(-1, (_GROUP, groups))
    within = grouped.amax(-2).topk(count, dim=-1, sorted=False).indices
    at = (within[..., None, :] + groups * torch.arange(_GROUP, device=scores.device)[:, None]).flatten(-2)
    last = torch.arange(tokens - rest, tokens, device=scores.device).expand(*at.shape[:-1], -1)
    at = torch.cat([at, last], -1)
    held = scores.gather(-1, at).topk(count, dim=-1, sorted=False).indices
    return at.gather(-1, held).sort(-1).values
