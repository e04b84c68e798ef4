"""ETC: a window, and global nodes beside the tokens."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.parts import Globals, Listed, Part, Patches, Scope, Window
from hf_sparse.patterns.labels import RelativeLabels
from hf_sparse.patterns.parent import Pattern, check_count, check_switch
from hf_sparse.patterns.star import node_globals

# what an int16 tells apart
_MOST_LABELS = 2**15


@dataclass(frozen=True)
class ETC(Pattern):
    """Every token reads ``radius`` tokens to each side and the global nodes, which are no tokens; every node reads all.

    Causal (the paper defines none): nodes read nodes alone, and there may be no ``segments``, whose nodes would start as what
    comes.

    Args:
        radius: tokens to each side; at least 1.
        num_global: global nodes, at least 1; with ``segments="given"`` what a row has room for. Not read where blocks have a
            node each.
        max_relative_distance: distance from which on neighbours share a label, at least 0; each label has a learned key vector
            and bias for each head, which start as 0. 0 leaves labels out.
        segments: what has a node of its own. A number: each block of so many tokens, at least 1. "given": the segments that
            come with each call as ``segment_ids``, such as sentences; a token of no segment is of no node, and packed
            documents have nodes of their own. None: nodes belong to nothing.
        hard_global_to_long: whether a node reads the tokens of its segment alone (and all nodes).
        hard_long_to_global: whether a token reads the node of its segment alone.

    Source: Ainslie et al. 2020, arXiv:2004.08483, section 3. Nodes start as the mean of their segment, or of an equal share
    of the tokens, and a learned vector; the paper's are embedded as tokens. Projections are shared by nodes and tokens, as in
    its default. Labels: relative positions of two tokens and of two nodes, and between a token and a node whether the token
    is of the node's segment, with tables for rows of tokens and of nodes. Drawn without a call, "given" segments are equal
    shares.
    """

    key: ClassVar[str] = "etc"
    radius: int = 84
    num_global: int = 256
    max_relative_distance: int = 12
    segments: int | str | None = None
    hard_global_to_long: bool = False
    hard_long_to_global: bool = False

    def check_fields(self) -> None:
        check_count(self.radius, "radius", least=1)
        check_count(self.num_global, "num_global", least=1)
        check_count(self.max_relative_distance, "max_relative_distance", least=0)
        if self.num_labels > _MOST_LABELS:
            raise ValueError(
                f"max_relative_distance={self.max_relative_distance} makes {self.num_labels} labels; at most {_MOST_LABELS} "
                "are served"
            )
        if isinstance(self.segments, str) and self.segments != "given":
            raise TypeError(f"segments must be a whole number, 'given' or none, got {self.segments!r}")
        if not isinstance(self.segments, str | None):
            check_count(self.segments, "segments", least=1)
        for name in ("hard_global_to_long", "hard_long_to_global"):
            check_switch(getattr(self, name), name)
            if getattr(self, name) and self.segments is None:
                raise ValueError(f"{name} needs segments: what has a node of its own")

    @property
    def takes_segments(self) -> bool:
        return self.segments == "given"

    def num_nodes(self, n: int) -> int:
        return -(-n // self.segments) if isinstance(self.segments, int) else self.num_global

    @property
    def num_node_vectors(self) -> int:
        return self.num_global if self.segments is None else 1

    def node_spans(self, n: int) -> Tensor:
        return block_spans(n, self.segments) if isinstance(self.segments, int) else even_spans(n, self.num_global)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        window = Window(before=self.radius, after=self.radius)
        if self.segments is None:
            return (window, node_globals(scope, scope.nodes))
        if scope.is_causal:
            raise ValueError(
                "segments cannot be used under causality: the node of a block knows what comes; set segments=None"
            )
        if not self.hard_global_to_long and not self.hard_long_to_global:
            return (window, node_globals(scope, scope.nodes))
        own = OwnNode(
            tokens=scope.length,
            spans=self._spans(scope),
            node_reads=self.hard_global_to_long,
            token_reads=self.hard_long_to_global,
        )
        if self.hard_long_to_global:
            first_key = scope.length if self.hard_global_to_long else 0
            return (window, own, NodeRows(tokens=scope.length, nodes=scope.nodes, first_key=first_key))
        positions = tuple(range(scope.length, scope.total))
        return (window, own, Globals(positions=positions, is_replaceable=False, reads_all=False))

    def wide_open(self, length: int) -> "ETC":
        hard = {"hard_global_to_long": False, "hard_long_to_global": False}
        segments = None if self.takes_segments else self.segments
        return dataclasses.replace(self, radius=length, segments=segments, **hard)

    @property
    def num_labels(self) -> int:
        return 4 * self.max_relative_distance + 6 if self.max_relative_distance else 0

    def label(self, q: Tensor, k: Tensor, scope: Scope) -> Tensor:
        n, most = scope.length, self.max_relative_distance
        lag = k - q
        relative = torch.where(lag >= 0, lag.clamp(max=most), most + (-lag).clamp(max=most))
        token, node = torch.minimum(q, k), torch.maximum(q, k) - n
        is_own = torch.zeros_like(lag, dtype=torch.bool)
        if self.segments is not None:
            is_own = node_of(self._spans(scope), n).to(q.device)[token.clamp(0, n - 1)] == node
        is_node = q >= n
        kind = torch.where(is_node == (k >= n), relative, 2 * most + 1 + is_own.long())
        return kind + (2 * most + 3) * is_node

    def _spans(self, scope: Scope) -> Tensor:
        if scope.spans is None:
            return self.node_spans(scope.length)
        return torch.tensor(scope.spans, dtype=torch.int64).view(-1, 2)

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        return RelativeLabels(self.num_labels, num_heads, head_dim) if self.num_labels else None


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnNode(Listed):
    """Segments and their nodes.

    Attributes:
        tokens: where the nodes begin.
        spans: int64 ``[nodes, 2]``, first and behind the last token of each, ascending and apart.
        node_reads: whether a node reads the tokens of its segment.
        token_reads: whether a token reads the node of its segment.
    """

    has_nodes: ClassVar[bool] = True
    tokens: int
    spans: Tensor
    node_reads: bool
    token_reads: bool

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        n, nodes = self.tokens, node_of(self.spans, self.tokens).to(q.device)
        own_q, own_k = (nodes[p.clamp(0, n - 1)].masked_fill((p < 0) | (p >= n), -1) for p in (q, k))
        node_reads = (own_k >= 0) & (own_k == q - n)
        token_reads = (own_q >= 0) & (own_q == k - n)
        return ((node_reads & self.node_reads) | (token_reads & self.token_reads))[None]

    def lists(self) -> Iterator[tuple[int, int, Tensor]]:
        if self.node_reads:
            # neighbours share a width: one long segment does not make the lists of all long
            for first in range(0, len(self.spans), NEIGHBOURS):
                spans = self.spans[first : first + NEIGHBOURS]
                keys = spans[:, :1] + torch.arange(int((spans[:, 1] - spans[:, 0]).max()))
                yield self.tokens + first, 1, keys.masked_fill(keys >= spans[:, 1:], -1)
        if self.token_reads:
            nodes = node_of(self.spans, self.tokens)[:, None]
            yield 0, 1, (nodes + self.tokens).masked_fill(nodes < 0, -1)


@dataclass(frozen=True, eq=False, kw_only=True)
class NodeRows(Patches):
    """Nodes that read all from ``first_key`` on."""

    has_nodes: ClassVar[bool] = True
    tokens: int
    nodes: int
    first_key: int

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        return ((q >= self.tokens) & (k >= self.first_key))[None]

    def patches(self) -> Iterator[tuple[Tensor, Tensor]]:
        total = self.tokens + self.nodes
        keys = torch.arange(self.first_key, total)
        for queries in torch.arange(self.tokens, total).split(256) if self.nodes else ():
            yield queries, keys


# nodes whose lists of tokens are made together
NEIGHBOURS = 32


def node_of(spans: Tensor, n: int) -> Tensor:
    """Return the node of each of ``n`` tokens, int64 ``[n]``; -1 for none.

    Args:
        spans: int64 ``[nodes, 2]``, first and behind the last token of each, ascending and apart.
        n: tokens.
    """
    sizes = spans[:, 1] - spans[:, 0]
    nodes = torch.full((n,), -1)
    tokens = torch.arange(int(sizes.sum())) + (spans[:, 0] - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
    nodes[tokens] = torch.arange(len(spans)).repeat_interleave(sizes)
    return nodes


def block_spans(n: int, size: int) -> Tensor:
    """Return first and behind the last token of each block, int64 ``[blocks, 2]``; the last block may be shorter."""
    start = torch.arange(0, n, size)
    return torch.stack([start, (start + size).clamp(max=n)], 1)


def even_spans(n: int, nodes: int) -> Tensor:
    """Return equal shares of ``n`` tokens, int64 ``[nodes, 2]``, each of at least one token."""
    edge = torch.arange(nodes + 1) * n // nodes
    start = edge[:-1].clamp(max=n - 1)
    return torch.stack([start, torch.maximum(edge[1:], start + 1)], 1)
