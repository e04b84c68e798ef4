"""Parts: the few shapes of edges that every position-based pattern is made of.

A pattern answers ``parts(scope)`` with a tuple of these. ``allows`` is the rule that the dense backend and the drawings
use; :mod:`hf_sparse.plan` turns the same parts into blocks of work. All positions are logical: counted from the first
real token of a sequence.
"""

import dataclasses
from dataclasses import dataclass

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
    """

    length: int
    heads: int
    layer: int = 0
    is_causal: bool = False
    head_offset: int = 0
    num_heads: int | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """A set of edges on some heads.

    Attributes:
        heads: heads it applies to, counted from 0 among those held here; None means all.
    """

    heads: frozenset[int] | None = None

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
    """Whole blocks: the query's own, ``before`` blocks behind it and ``after`` blocks ahead."""

    block: int
    before: int = 0
    after: int = 0

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        lag = q // self.block - k // self.block
        return ((lag <= self.before) & (lag >= -self.after))[None]


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
    """Tokens that everyone reads and that read everyone.

    Attributes:
        positions: logical positions of the tokens; those at or beyond the end of the sequence are left out.
        is_replaceable: whether a ``global_mask`` takes the place of ``positions``.
        has_projections: whether their rows use projections of their own, where there are some.
    """

    positions: tuple[int, ...] = ()
    is_replaceable: bool = True
    has_projections: bool = False

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        positions = torch.tensor(self.positions, dtype=torch.int64, device=q.device)
        return (torch.isin(q, positions) | torch.isin(k, positions))[None]


def edge_mask(
    parts: tuple[Part, ...], q: Tensor, k: Tensor, *, heads: int, is_causal: bool, rows: str = "all"
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

    Returns:
        bool ``[heads, T, S]``.
    """
    shape = torch.broadcast_shapes(q.shape, k.shape)
    mask = torch.zeros((heads, *shape), dtype=torch.bool, device=q.device)
    has_own = torch.zeros((heads, q.shape[0], 1), dtype=torch.bool, device=q.device)
    for part in parts:
        index = list(range(heads)) if part.heads is None else sorted(part.heads)
        allowed = part.allows(q, k)
        mask[index] |= allowed[index] if allowed.shape[0] > 1 else allowed
        if isinstance(part, Globals) and part.has_projections:
            has_own[index] |= torch.isin(q, torch.tensor(part.positions, dtype=torch.int64, device=q.device))
    if rows != "all":
        mask &= has_own if rows == "own" else ~has_own
    return mask & (k <= q) if is_causal else mask


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
