"""Sparse Transformer: a local and a summarising set of keys, on one head, on different heads or on different layers."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import BlockWindow, Globals, Part, Scope, Window
from hf_sparse.patterns.parent import Pattern, check_choice, check_count

_KINDS = ("strided", "fixed")
_HEADS = ("merged", "interleaved", "separate")
_LOCAL = ("paper", "code")


@dataclass(frozen=True)
class SparseTransformer(Pattern):
    """Every token reads what is near it, and either each ``stride``-th token or the summary tokens of every block.

    With l = ``stride`` and c = ``summary`` the two sets are

    - "strided": the keys at most l away; and those whose distance is a multiple of l. Suits images whose rows are l long.
    - "fixed": the query's own block of l tokens; and the last c tokens of every block. Suits text.

    The paper's are causal; without causality the same distances count on both sides. Where a query's set is empty (the first
    tokens under the summaries alone) its output is 0.

    Args:
        kind: "strided" or "fixed".
        stride: l, in tokens; at least 1.
        summary: c, summary tokens at the end of a block, at least 1 and at most ``stride``; for "fixed".
        heads: "merged" gives every head both sets; "interleaved" gives even layers the first and odd layers the second;
            "separate" gives the first half of the heads the first set, the others the second, and under "fixed" each of these
            others has c summary tokens of its own, counted from the end of the block.
        local_window: under "strided", "paper" reads keys at most l away, "code" less than l away, as published code does.

    Source: Child et al. 2019, arXiv:1904.10509, sections 4.2 and 4.3, and openai/sparse_attention.
    """

    key: ClassVar[str] = "sparse_transformer"
    kind: str = "fixed"
    stride: int = 128
    summary: int = 32
    heads: str = "merged"
    local_window: str = "paper"

    def check_fields(self) -> None:
        check_choice(self.kind, "kind", _KINDS)
        check_count(self.stride, "stride", least=1)
        check_count(self.summary, "summary", least=1)
        check_choice(self.heads, "heads", _HEADS)
        check_choice(self.local_window, "local_window", _LOCAL)
        if self.kind == "fixed" and self.summary > self.stride:
            raise ValueError(f"summary must be at most stride {self.stride}, got {self.summary}")

    @property
    def varies_by_layer(self) -> bool:
        return self.heads == "interleaved"

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        if self.heads == "merged":
            return (self._local(), self._far(scope, 0))
        if self.heads == "interleaved":
            return (self._local() if scope.layer % 2 == 0 else self._far(scope, 0),)
        first = -(-(scope.num_heads or scope.head_offset + scope.heads) // 2)
        by_slot: dict[int, set[int]] = {}
        slots = self.stride // self.summary if self.kind == "fixed" else 1
        for head in range(scope.heads):
            other = head + scope.head_offset - first
            by_slot.setdefault(-1 if other < 0 else other % slots, set()).add(head)
        return tuple(
            self._local(frozenset(held)) if slot < 0 else self._far(scope, slot, frozenset(held))
            for slot, held in sorted(by_slot.items())
        )

    def _local(self, heads: frozenset[int] | None = None) -> Part:
        if self.kind == "fixed":
            return BlockWindow(heads=heads, block=self.stride)
        reach = self.stride - (self.local_window == "code")
        return Window(heads=heads, before=reach, after=reach)

    def _far(self, scope: Scope, slot: int, heads: frozenset[int] | None = None) -> Part:
        if self.kind == "strided":
            return Window(heads=heads, dilation=self.stride)
        end = self.stride - slot * self.summary
        columns = (
            position
            for start in range(0, scope.length, self.stride)
            for position in range(start + end - self.summary, start + end)
        )
        held = tuple(position for position in columns if position < scope.length)
        return Globals(heads=heads, positions=held, is_replaceable=False, reads_all=False)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        if self.heads == "separate" and num_heads < 2:
            raise ValueError(f"heads='separate' needs at least 2 heads, but the model has {num_heads}")
        if self.heads == "interleaved" and num_layers < 2:
            raise ValueError(f"heads='interleaved' needs at least 2 layers, but the model has {num_layers}")

    def wide_open(self, length: int) -> "SparseTransformer":
        return SparseTransformer(self.kind, max(length, self.summary), self.summary, "merged", self.local_window)
