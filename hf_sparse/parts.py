"""Parts: the few shapes of edges that every position-based pattern is made of.

A pattern answers ``parts(scope)`` with a tuple of these. ``allows`` is the rule that the dense backend and the drawings
use; :mod:`hf_sparse.plan` turns the same parts into blocks of work. All positions are logical: counted from the first
real token of a sequence. Nodes that are no tokens have the positions behind the last token.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scope:
    """What a pattern may depend on besides positions.

    Attributes:
        length: tokens of the sequence, at least 1.
        heads: number of query heads held here.
        layer: index of the layer among the self-attention layers of its stack.
        is_causal: whether a query may read only itself and what is before it.
        head_offset: index of the first head held here (above 0 on tensor or sequence parallel ranks).
        num_heads: heads of the whole layer; None means none beyond those held here.
        nodes: nodes behind the tokens, which are no tokens.
        spans: first and behind the last token of each node, where the call says so.
    """

    length: int
    heads: int
    layer: int = 0
    is_causal: bool = False
    head_offset: int = 0
    num_heads: int | None = None
    nodes: int = 0
    spans: tuple[tuple[int, int], ...] | None = None

    @property
    def total(self) -> int:
        """Tokens and nodes."""
        return self.length + self.nodes


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A set of edges on some heads.

    Attributes:
        heads: heads it applies to, counted from 0 among those held here; None means all.
        has_nodes: whether it speaks of nodes; of a part that does not, nodes are no edges, whatever the rule says.
    """

    heads: frozenset[int] | None = None
    has_nodes: ClassVar[bool] = False

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        """Say which pairs are edges of this part, causality aside.

        Args:
            q: int64, logical query positions.
            k: int64, logical key positions, broadcastable with ``q``.

        Returns:
            bool ``[H or 1, *broadcast(q, k)]``; True where the query reads the key.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Window(Part):
    """Keys at most ``before`` steps behind and ``after`` steps ahead, a step being ``dilation`` tokens; None: no end."""

    before: int | None = None
    after: int | None = None
    dilation: int = 1

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        lag = q - k
        allowed = lag % self.dilation == 0 if self.dilation > 1 else torch.ones_like(lag, dtype=torch.bool)
        if self.before is not None:
            allowed = allowed & (lag <= self.before * self.dilation)
        if self.after is not None:
            allowed = allowed & (lag >= -self.after * self.dilation)
        return allowed[None]


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockWindow(Part):
    """The query's own block, ``before`` tokens behind it and ``after`` tokens ahead; the first block begins at ``offset``."""

    block: int
    before: int = 0
    after: int = 0
    offset: int = 0

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        start = (q - self.offset) // self.block * self.block + self.offset
        is_beside = (k >= start - self.before) & (k < start + self.block + self.after)
        return (is_beside & (q >= self.offset) & (k >= self.offset) if self.offset else is_beside)[None]

    @property
    def is_of_blocks(self) -> bool:
        """Whether it reads whole blocks, counted from the first token."""
        return not (self.offset or self.before % self.block or self.after % self.block)


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockTable(Part):
    """Blocks named by a table: int64 ``[H or 1, NQ, W]``, the key blocks each query block reads; -1 means none."""

    block: int
    table: Tensor

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = q // self.block, k // self.block
        if q.dim() == k.dim() == 2 and q.shape[1] == k.shape[0] == 1 and k.numel():
            return self._allows_grid(q[:, 0], k[0])
        q, k = torch.broadcast_tensors(q, k)
        table = self.table.to(q.device)
        # padding on the left has positions below 0: in no block, and not to be taken for the table's -1
        is_inside = (q >= 0) & (q < table.shape[1]) & (k >= 0)
        row = q.clamp(0, table.shape[1] - 1)
        allowed = torch.zeros((table.shape[0], *q.shape), dtype=torch.bool, device=q.device)
        for column in range(table.shape[2]):
            allowed |= is_inside & (table[:, :, column][:, row] == k)
        return allowed

    def _allows_grid(self, q: Tensor, k: Tensor) -> Tensor:
        """Return ``allows`` of every query block ``[T]`` with every key block ``[S]``, much faster."""
        table, none = self.table.to(q.device), max(int(k.max()), 0) + 1
        reads = torch.zeros((*table.shape[:2], none + 1), dtype=torch.bool, device=q.device)
        reads.scatter_(2, table.masked_fill((table < 0) | (table > none), none), True)
        reads[..., none] = False
        is_inside = (q >= 0) & (q < table.shape[1])
        rows = reads[:, q.clamp(0, table.shape[1] - 1)] & is_inside[:, None]
        return rows.index_select(2, k.masked_fill(k < 0, none))


@dataclass(frozen=True, eq=False, kw_only=True)
class Globals(Part):
    """Tokens or nodes that everyone reads and that read everyone.

    Attributes:
        positions: logical positions; those at or beyond the end of tokens and nodes are left out.
        is_replaceable: whether a ``global_mask`` takes the place of ``positions``.
        has_projections: whether their rows use projections of their own, where there are some.
        reads_all: whether they read everyone; if not, they are read by all and read no more than others do.
    """

    has_nodes: ClassVar[bool] = True
    positions: tuple[int, ...] = ()
    is_replaceable: bool = True
    has_projections: bool = False
    reads_all: bool = True

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        positions = torch.tensor(self.positions, dtype=torch.int64, device=q.device)
        is_read = torch.isin(k, positions).expand(torch.broadcast_shapes(q.shape, k.shape))
        return (is_read | torch.isin(q, positions) if self.reads_all else is_read)[None]


@dataclass(frozen=True, eq=False, kw_only=True)
class Patches(Part):
    """Sets of queries, each against a set of keys; ``allows`` says which pairs of a patch are edges."""

    def patches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield positions of queries and of keys, int64 and ascending; no query stands in two patches that share a key."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Listed(Part):
    """Blocks of consecutive queries, each against a list of keys; ``allows`` says which pairs of a list are edges."""

    def lists(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first query, the queries of a block, and int64 ``[blocks, W]``: the keys of each block, -1 for none."""
        raise NotImplementedError


def can_see(q: Tensor, k: Tensor, tokens: int | None) -> Tensor:
    """Say which pairs causality leaves: no token reads a later token, and of nodes each part takes care itself.

    Args:
        q: int64, logical query positions.
        k: int64, logical key positions, broadcastable with ``q``.
        tokens: where nodes begin; None where there are none.
    """
    return k <= q if tokens is None else (k <= q) | (k >= tokens) | (q >= tokens)


def edge_mask(
    parts: tuple[Part, ...],
    q: Tensor,
    k: Tensor,
    *,
    heads: int,
    is_causal: bool,
    rows: str = "all",
    tokens: int | None = None,
) -> Tensor:
    """Evaluate the union of parts.

    Args:
        parts: the parts of a pattern.
        q: int64 ``[T, 1]``, logical query positions.
        k: int64 ``[1, S]``, logical key positions.
        heads: number of heads held here.
        is_causal: whether keys ahead of the query are left out.
        rows: "all" rows; "shared", without those of global tokens that have projections of their own (they read nothing);
            or "own", only those.
        tokens: where nodes begin; None where there are none.

    Returns:
        bool ``[heads, T, S]``.
    """
    shape = torch.broadcast_shapes(q.shape, k.shape)
    mask = torch.zeros((heads, *shape), dtype=torch.bool, device=q.device)
    has_own = torch.zeros((heads, q.shape[0], 1), dtype=torch.bool, device=q.device)
    for part in parts:
        # all heads in one slice: a list of them would copy the mask
        index = slice(heads) if part.heads is None else sorted(part.heads)
        allowed = part.allows(q, k)
        if tokens is not None and not part.has_nodes:
            allowed = allowed & (q < tokens) & (k < tokens)
        mask[index] |= allowed[index] if allowed.shape[0] > 1 else allowed
        if isinstance(part, Globals) and part.has_projections:
            has_own[index] |= torch.isin(q, torch.tensor(part.positions, dtype=torch.int64, device=q.device))
    if rows != "all":
        mask &= has_own if rows == "own" else ~has_own
    return mask & can_see(q, k, tokens) if is_causal else mask


def with_global_positions(parts: tuple[Part, ...], positions: tuple[int, ...] | None) -> tuple[Part, ...]:
    """Put the positions of a sample's global mask in the place of the pattern's own.

    Args:
        parts: the parts of a pattern.
        positions: logical positions of this sample's global tokens; None leaves the parts as they are.
    """
    if positions is None:
        return parts
    return tuple(
        dataclasses.replace(part, positions=positions) if isinstance(part, Globals) and part.is_replaceable else part
        for part in parts
    )
