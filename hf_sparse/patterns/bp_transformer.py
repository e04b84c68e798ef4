"""BP-Transformer: a binary tree of spans over the tokens; near ones are read finely, far ones coarsely."""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.parts import Listed, Part, Scope
from hf_sparse.patterns.labels import RelativeLabels
from hf_sparse.patterns.parent import Pattern, check_choice, check_count

# queries of a block
_BLOCK = 64


@dataclass(frozen=True)
class BPTransformer(Pattern):
    """Every token reads itself and spans of tokens to each side, the longer the farther they are.

    Of each size it reads a few, and together they hold every other token once (causal: every earlier token).

    Spans are the nodes of a binary tree over the tokens: level j has one for each 2 ** j tokens, the last may be shorter.

    Args:
        nodes_per_level: spans of each size that a token reads to each side; at least 1.
        spans: "nodes" lets spans live through the layers, each reading its own tokens, as published. "pooled" makes them anew
            on each layer, as the mean of the keys and values of their tokens, with the logarithm of their size added to the
            score: then a token reads a span as if it read that many tokens that are all alike, which suits a dense checkpoint.
        clip_distance: level from which on pairs share labels, at least 0; a label is a level, a side and how many spans of that
            level lie between, and has a learned key vector that heads share and that starts as 0. 0 leaves labels out; the
            published code has 2 to 6. For "nodes".

    Source: Ye et al. 2019, arXiv:1911.04070, section 3, and yzh119/BPT, whose graph covers some tokens twice near the end where
    their number is no power of two; ours never does. Spans start as the mean of their tokens, the published ones as zeros. A
    span that is read in the place of a parent has the label of its own level. "pooled" is ours.
    """

    key: ClassVar[str] = "bp_transformer"
    nodes_per_level: int = 4
    spans: str = "nodes"
    clip_distance: int = 0

    def check_fields(self) -> None:
        check_count(self.clip_distance, "clip_distance", least=0)
        check_count(self.nodes_per_level, "nodes_per_level", least=1)
        check_choice(self.spans, "spans", ("nodes", "pooled"))
        if self.clip_distance and self.pools_nodes:
            raise ValueError(f"clip_distance must be 0 where spans are pooled, got {self.clip_distance}")

    def num_nodes(self, n: int) -> int:
        return sum(level_sizes(n)[1:])

    @property
    def pools_nodes(self) -> bool:
        return self.spans == "pooled"

    def node_spans(self, n: int) -> Tensor:
        spans = []
        for level, count in enumerate(level_sizes(n)):
            start = torch.arange(count) << level
            spans.append(torch.stack([start, (start + (1 << level)).clamp(max=n)], 1))
        return torch.cat(spans[1:]) if len(spans) > 1 else torch.zeros(0, 2, dtype=torch.int64)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        contexts = self._contexts(scope)
        return (contexts,) if self.pools_nodes else (contexts, Leaves(tokens=scope.length))

    def wide_open(self, length: int) -> "BPTransformer":
        # with so many nodes there would be as many labels, and none but 0 at the start
        return dataclasses.replace(self, nodes_per_level=length, clip_distance=0)

    def _contexts(self, scope: Scope) -> "Contexts":
        intervals = _intervals(scope.length, self.nodes_per_level, scope.is_causal)
        return Contexts(tokens=scope.length, intervals=intervals)

    @property
    def num_labels(self) -> int:
        return (2 * self.nodes_per_level + 1) * (self.clip_distance + 1) if self.clip_distance else 0

    def label(self, q: Tensor, k: Tensor, scope: Scope) -> Tensor:
        contexts, most = self._contexts(scope), self.nodes_per_level - 1
        level, node = contexts.place(torch.where(q < scope.length, k, q))
        near = [contexts.intervals[level, side, 1 - side, q.clamp(max=scope.length - 1)] for side in range(2)]
        left, right = (near[0] - node).clamp(max=most), (node - near[1]).clamp(max=most)
        is_left = node << level < q
        slot = torch.where(is_left, 2 * left + 1, 2 * right + 2)
        slot = torch.where((q == k) | (q >= scope.length), 0, slot)
        return (2 * self.nodes_per_level + 1) * level.clamp(max=self.clip_distance) + slot.clamp(0, 2 * most + 2)

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        return RelativeLabels(self.num_labels, 1, head_dim, has_bias=False) if self.num_labels else None


def level_sizes(n: int) -> list[int]:
    """Return the nodes of each level, from the tokens up to the root."""
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


@functools.lru_cache(maxsize=8)
def _intervals(n: int, slots: int, is_causal: bool) -> Tensor:
    """Return what every token reads: first and last node of each level, to the left and to the right.

    Args:
        n: tokens.
        slots: nodes of a level to each side.
        is_causal: whether there is a right side.

    Returns:
        int64 ``[levels, 2, 2, n]``: side and end; where the last is before the first there is none.
    """
    sizes = level_sizes(n)
    found = torch.empty(len(sizes), 2, 2, n, dtype=torch.int64)
    found[:, :, 0], found[:, :, 1] = 1, 0
    position = torch.arange(n)
    for side in range(1 if is_causal else 2):
        # counted away from the token: the nodes left of it, and from a level to the next whether a child waits
        at, waits = position - 1 if side == 0 else position + 1, torch.zeros(n, dtype=torch.bool)
        step = -1 if side == 0 else 1
        for level, size in enumerate(sizes):
            at = at + step * waits
            taken = torch.full((n,), slots) - waits.long()
            left = at + 1 if side == 0 else size - at
            taken = torch.minimum(taken, left).clamp(min=0)
            end = at + step * taken
            is_left = (end >= 0) & (end < size)
            # a node whose sibling has been read cannot go up into their parent: it is read as it is, as one of the next level
            waits = is_left & (end % 2 == (0 if side == 0 else 1))
            last = torch.where(waits, end, end - step)
            low, high = (last, at) if side == 0 else (at, last)
            found[level, side, 0], found[level, side, 1] = low, high
            at = torch.where(is_left, end // 2, -1 if side == 0 else n)
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class Contexts(Listed):
    """The spans that tokens read, and each token itself.

    Attributes:
        tokens: where the nodes begin.
        intervals: int64 ``[levels, 2, 2, n]``, first and last node of each level that a token reads to each side.
    """

    has_nodes: ClassVar[bool] = True
    tokens: int
    intervals: Tensor

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        level, node = self.place(k)
        reads = q == k
        for side in range(2):
            first, last = (self.intervals[level, side, end, q.clamp(0, self.tokens - 1)] for end in range(2))
            reads = reads | ((first <= node) & (node <= last))
        return (reads & (q >= 0) & (q < self.tokens) & (k >= 0))[None]

    def lists(self) -> Iterator[tuple[int, int, Tensor]]:
        whole = self.tokens // _BLOCK * _BLOCK
        if whole:
            yield 0, _BLOCK, self._keys(slice(0, whole), _BLOCK)
        if whole < self.tokens:
            yield whole, self.tokens - whole, self._keys(slice(whole, self.tokens), self.tokens - whole)

    def place(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return the level of each position, and the place within it."""
        starts = self._starts().to(position.device)
        level = (torch.bucketize(position.contiguous(), starts, right=True) - 1).clamp(min=0)
        return level, position - starts[level]

    def _starts(self) -> Tensor:
        """Return the position of the first node of each level."""
        return torch.tensor([0, *level_sizes(self.tokens)[:-1]]).cumsum(0)

    def _keys(self, tokens: slice, block: int) -> Tensor:
        """Return all that the tokens of each block read, int64 ``[blocks, W]``; -1 for none."""
        columns = []
        position = torch.arange(self.tokens)[tokens].view(-1, block)
        for level, start in enumerate(self._starts().tolist()):
            first, last = self.intervals[level, :, :, tokens].unflatten(2, (-1, block)).unbind(1)
            is_none = first > last
            low = first.masked_fill(is_none, self.tokens).amin((0, 2))
            high = last.masked_fill(is_none, -1).amax((0, 2))
            if level == 0:
                low, high = torch.minimum(low, position[:, 0]), torch.maximum(high, position[:, -1])
            width = int((high - low).max()) + 1
            if width > 0:
                node = low[:, None] + torch.arange(width)
                columns.append((node + start).masked_fill(node > high[:, None], -1))
        return torch.cat(columns, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Leaves(Listed):
    """The tokens of every span, which it reads; ``tokens`` says where the nodes begin."""

    has_nodes: ClassVar[bool] = True
    tokens: int

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        sizes = level_sizes(self.tokens)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        level = (torch.bucketize(q, starts, right=True) - 1).clamp(min=0)
        return ((q >= self.tokens) & (k < self.tokens) & (k >= 0) & (k >> level == q - starts[level]))[None]

    def lists(self) -> Iterator[tuple[int, int, Tensor]]:
        start = self.tokens
        for level, count in enumerate(level_sizes(self.tokens)):
            if level == 0:
                continue
            # small spans side by side, so that their tokens fill a block
            block = max(1, _BLOCK >> level)
            whole = count // block * block
            width = block << level
            for first, rows in ((0, whole // block), (whole, 1)):
                spans = block if first < whole else count - whole
                if rows and spans:
                    keys = (first << level) + torch.arange(rows)[:, None] * width + torch.arange(spans << level)
                    yield start + first, spans, keys.masked_fill(keys >= self.tokens, -1)
            start += count
