"""Lanes: the heads that a kernel call runs for, and how a tile's queries and keys are read and written there.

A ``Head`` is one head of one row, whose tensors are made dense once for all its runs of blocks. A ``Sheet`` is one tile for
several rows and heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.backends.kernels import Scratch
from hf_sparse.tiles import Gather, Mask, MaskByHead, Run, Tile, Work

Words = tuple[Tensor, Tensor]

# keys of all heads together whose gradient is first computed apart
MOST_COPIED = 1 << 14


@dataclass(frozen=True)
class Sheet:
    """One tile for some rows and consecutive heads.

    Attributes:
        work: the tile.
        rows: rows of the batch.
        heads: query heads.
        first: place of the first head among those that share the tile.
        ratio: query heads that read one key head.
        scratch: where products are held.
    """

    work: Tile
    rows: slice
    heads: slice
    first: int
    ratio: int
    scratch: Scratch

    def queries(self, tensor: Tensor, name: str = "", factor: float = 1.0) -> Tensor:
        """Return the tile's queries of ``[B, H, T, ...]`` as ``[X, T, ...]``, multiplied by a factor."""
        held = tensor[self.rows, self.heads][:, :, self.work.q].flatten(0, 1)
        return held if factor == 1.0 else torch.mul(held, factor, out=self.scratch.take(name, tuple(held.shape), held))

    def keys(self, tensor: Tensor, _name: str) -> Tensor:
        """Return the tile's keys of ``[B, G, S, ...]`` as ``[X, S, ...]``, a key head for each query head."""
        heads = self._key_heads(tensor)
        if isinstance(heads, slice):
            # heads first: keys named by index are copied
            return tensor[self.rows, heads][:, :, self.work.k].flatten(0, 1)
        return tensor[self.rows][:, :, self.work.k][:, heads].flatten(0, 1)

    def of_queries(self, _piece: Work, held: Tensor) -> Tensor:
        """Return a piece's part of what ``queries`` gave: all of it."""
        return held

    def of_keys(self, _piece: Work, held: Tensor) -> Tensor:
        """Return a piece's part of what ``keys`` gave: all of it."""
        return held

    def mask(self, mask: Mask | None, like: Tensor) -> Tensor | None:
        """Return the tile's mask as a term of the scores, ``[T, S]`` or ``[X, T, S]``."""
        if mask is None:
            return None
        heads = slice(self.first, self.first + self.heads.stop - self.heads.start)
        if isinstance(mask, MaskByHead):
            term = mask.of_heads(heads, like)
        elif (term := mask.additive(like)).dim() < 4:
            return term
        else:
            term = term[:, heads]
        rows = len(range(*self.rows.indices(like.shape[0])))
        return term.expand(rows, -1, -1, -1).flatten(0, 1)

    def words(self, _piece: Work, words: Words | None) -> Words | None:
        """Return the words of the dropout of a piece."""
        return None if words is None else (words[0], words[1][self.work.k][None])

    def positions(self, _piece: Work, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a piece's queries ``[1, T]`` and keys ``[1, S]`` stand, given where all do."""
        return queries[self.work.q][None], keys[self.work.k][None]

    def of_head(self, table: Tensor, names: Tensor) -> Tensor:
        """Return entries ``[X, T, S]`` of each head's row of a table ``[H, W]``, named by ``[1, T, S]``."""
        picked = table[self.heads][:, names[0]]
        rows = self.rows.stop - self.rows.start
        return picked if rows == 1 else picked.repeat(rows, 1, 1)

    def add_to_head(self, total: Tensor, names: Tensor, grads: Tensor) -> None:
        """Add ``[X, T, S]`` to the entries of ``[H, W]`` that ``of_head`` gave."""
        held = grads.unflatten(0, (-1, self.heads.stop - self.heads.start)).sum(0).flatten(1).to(total.dtype)
        total[self.heads].scatter_add_(1, names.flatten().expand_as(held), held)

    def merge(self, _piece: Work, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Add what a piece gave to ``out`` and ``lse``."""
        held = [tensor[self.rows, self.heads] for tensor in (out, lse)]
        at_out, at_lse = (tensor[:, :, self.work.q] for tensor in held)
        _merge(at_out, at_lse, part.view(at_out.shape), part_lse.view(at_lse.shape), is_first=self.work.is_first)
        if isinstance(self.work.q, Tensor):
            held[0][:, :, self.work.q], held[1][:, :, self.work.q] = at_out, at_lse

    def open_sum(self, tensor: Tensor, _name: str) -> Tensor:
        """Return where gradients of keys are added."""
        return tensor

    def close_sum(self, tensor: Tensor, held: Tensor) -> None:
        """Add what was held apart: nothing."""

    def add_to_queries(self, _piece: Work, total: Tensor, weights: Tensor, keys: Tensor, factor: float) -> None:
        """Add a factor times the product of weights ``[X, T, S]`` and keys to the queries of a piece."""
        self.add_rows(_piece, total, _product(weights, keys, self.scratch), factor)

    def add_rows(self, _piece: Work, total: Tensor, rows: Tensor, factor: float) -> None:
        """Add a factor times rows ``[X, T, ...]`` to the queries of a piece."""
        held = total[self.rows, self.heads]
        rows = rows.unflatten(0, held.shape[:2])
        if isinstance(self.work.q, Tensor):
            held.index_add_(2, self.work.q.to(held.device), rows, alpha=factor)
        else:
            held[:, :, self.work.q].add_(rows, alpha=factor)

    def add_to_keys(self, _piece: Work, total: Tensor, weights: Tensor, queries: Tensor, factor: float) -> None:
        """Add a factor times the product of weights ``[X, T, S]``, transposed, and queries to the keys of a piece."""
        held, heads, weights = total[self.rows], self._key_heads(total), weights.transpose(1, 2)
        if isinstance(heads, slice) and isinstance(self.work.k, Tensor):
            product = _product(weights, queries, self.scratch).unflatten(0, (len(held), -1))
            held[:, heads].index_add_(2, self.work.k.to(held.device), product, alpha=factor)
            return
        at = held[:, :, self.work.k]
        if isinstance(heads, slice) and len(at) == 1 and weights.shape[0] * weights.shape[1] > MOST_COPIED:
            # head by head, without a copy of a long row of keys
            at[0, heads].baddbmm_(weights, queries, alpha=factor)
        else:
            product = _product(weights, queries, self.scratch).unflatten(0, (len(at), -1))
            if isinstance(heads, slice):
                at[:, heads].add_(product, alpha=factor)
            else:
                at.index_add_(1, heads, product, alpha=factor)
        if isinstance(self.work.k, Tensor):
            held[:, :, self.work.k] = at

    def _key_heads(self, keys: Tensor) -> slice | Tensor:
        if self.ratio == 1:
            return self.heads
        return torch.arange(self.heads.start, self.heads.stop, device=keys.device) // self.ratio


@dataclass(frozen=True)
class Head:
    """One head of one row, for runs of blocks and blocks named by index.

    Attributes:
        row: row of the batch.
        head: query head.
        key_head: the key head that it reads.
        scratch: where its tensors are held densely.
    """

    row: int
    head: int
    key_head: int
    scratch: Scratch

    def queries(self, tensor: Tensor, name: str = "", factor: float = 1.0) -> Tensor:
        """Return all queries of ``[B, H, T, ...]`` as ``[T, ...]``, multiplied by a factor and, if named, dense."""
        return self._dense(tensor[self.row, self.head], name, factor)

    def keys(self, tensor: Tensor, name: str) -> Tensor:
        """Return all keys of ``[B, G, S, ...]`` as ``[S, ...]``, dense."""
        return self._dense(tensor[self.row, self.key_head], name, 1.0)

    def of_queries(self, piece: Work, held: Tensor) -> Tensor:
        """Return a piece's part of what ``queries`` gave, ``[X, T, ...]``, a view."""
        if isinstance(piece, Run):
            return _windows(held[piece.offset :: piece.step], piece.first, piece.blocks, piece.stride, piece.block)
        assert isinstance(piece, Gather)
        blocks = len(piece.index)
        return held[piece.first : piece.first + blocks * piece.block].unflatten(0, (blocks, piece.block))

    def of_keys(self, piece: Work, held: Tensor) -> Tensor:
        """Return a piece's part of what ``keys`` gave, ``[X, S, ...]``: a view, or a copy where keys are named by index."""
        if isinstance(piece, Run):
            return self._run_keys(piece, held)
        assert isinstance(piece, Gather)
        units = _units(piece, held).index_select(0, piece.index.flatten().to(held.device))
        return units.flatten(0, 1).unflatten(0, (len(piece.index), -1))

    def mask(self, mask: Mask | None, like: Tensor) -> Tensor | None:
        """Return a piece's mask as a term of the scores, ``[T, S]`` or ``[X, T, S]``."""
        return None if mask is None else mask.additive(like)

    def words(self, piece: Work, words: Words | None) -> Words | None:
        """Return the words of the dropout of a piece."""
        return None if words is None else (self.of_queries(piece, words[0]), self.of_keys(piece, words[1]))

    def positions(self, piece: Work, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a piece's queries ``[X, T]`` and keys ``[X, S]`` stand, given where all do; X is 1 for a run.

        Of a run the first block stands for all, in which the distances are the same.
        """
        if isinstance(piece, Run):
            piece = next(piece.consecutive(1))
        return self.of_queries(piece, queries), self.of_keys(piece, keys)

    def of_head(self, table: Tensor, names: Tensor) -> Tensor:
        """Return entries of this head's row of a table ``[H, W]``, in the shape of their names."""
        return table[self.head][names]

    def add_to_head(self, total: Tensor, names: Tensor, grads: Tensor) -> None:
        """Add ``[X, T, S]`` to the entries of ``[H, W]`` that ``of_head`` gave."""
        held = grads if len(names) == len(grads) else grads.sum(0)
        total[self.head].index_add_(0, names.flatten(), held.flatten().to(total.dtype))

    def merge(self, piece: Work, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        """Add what a piece gave to ``out`` and ``lse``."""
        at_out, at_lse = (self.of_queries(piece, tensor[self.row, self.head]) for tensor in (out, lse))
        _merge(at_out, at_lse, part, part_lse, is_first=piece.is_first)

    def open_sum(self, tensor: Tensor, name: str) -> Tensor:
        """Return where gradients of the keys are added, dense."""
        own = tensor[self.row, self.key_head]
        return own if own.is_contiguous() else self.scratch.take(name, tuple(own.shape), tensor).zero_()

    def close_sum(self, tensor: Tensor, held: Tensor) -> None:
        """Add what was held apart."""
        own = tensor[self.row, self.key_head]
        if not own.is_contiguous():
            own.add_(held)

    def add_to_queries(self, piece: Work, total: Tensor, weights: Tensor, keys: Tensor, factor: float) -> None:
        """Add a factor times the product of weights ``[X, T, S]`` and keys to the queries of a piece."""
        self.add_rows(piece, total, _product(weights, keys, self.scratch), factor)

    def add_rows(self, piece: Work, total: Tensor, rows: Tensor, factor: float) -> None:
        """Add a factor times rows ``[X, T, ...]`` to the queries of a piece."""
        self.of_queries(piece, total[self.row, self.head]).add_(rows, alpha=factor)

    def add_to_keys(self, piece: Work, total: Tensor, weights: Tensor, queries: Tensor, factor: float) -> None:
        """Add a factor times the product of weights ``[X, T, S]``, transposed, and queries to the keys of a piece."""
        weights = weights.transpose(1, 2)
        if isinstance(piece, Gather):
            units = _product(weights, queries, self.scratch).flatten(0, 1).unflatten(0, (-1, piece.unit))
            _units(piece, total).index_add_(0, piece.index.flatten().to(total.device), units, alpha=factor)
            return
        assert isinstance(piece, Run)
        # the windows of a piece lie apart: each key is written once
        at = self._run_keys(piece, total)
        if at.is_contiguous():
            at.baddbmm_(weights, queries, alpha=factor)
        else:
            at.add_(_product(weights, queries, self.scratch), alpha=factor)

    def _run_keys(self, piece: Run, held: Tensor) -> Tensor:
        tokens = held[piece.offset :: piece.step]
        return _windows(tokens, piece.first - piece.back, piece.blocks, piece.stride, piece.width)

    def _dense(self, held: Tensor, name: str, factor: float) -> Tensor:
        if not name or (factor == 1.0 and held.is_contiguous()):
            return held
        return torch.mul(held, factor, out=self.scratch.take(name, tuple(held.shape), held))


def _product(left: Tensor, right: Tensor, scratch: Scratch) -> Tensor:
    return torch.bmm(left, right, out=scratch.take("product", (*left.shape[:2], right.shape[2]), left))


def _windows(tokens: Tensor, first: int, blocks: int, stride: int, width: int) -> Tensor:
    """Return ``[blocks, width, ...]``: a window of ``[n, ...]`` at each multiple of the stride from ``first`` on, as a view."""
    step, *rest = tokens.stride()
    shape, strides = (blocks, width, *tokens.shape[1:]), (stride * step, step, *rest)
    return tokens.as_strided(shape, strides, tokens.storage_offset() + first * step)


def _units(work: Gather, tokens: Tensor) -> Tensor:
    """Return whole units of keys ``[units, unit, ...]``, as a view."""
    units = len(tokens) // work.unit
    return tokens[: units * work.unit].unflatten(0, (units, work.unit))


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, is_first: bool) -> None:
    """Add a tile to what other tiles gave the same queries, in place."""
    if is_first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out.mul_((lse - safe).exp_()[..., None]).addcmul_(part, (part_lse - safe).exp_()[..., None])
    lse.copy_(total)
