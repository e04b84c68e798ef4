"""Strided: every token reads each ``stride``-th token."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import Part, Scope, Window
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class Strided(Pattern):
    """Every token reads the tokens whose distance is a multiple of ``stride``, itself included.

    Args:
        stride: distance between neighbouring keys, in tokens; at least 1 (1 is dense).

    Source: Child et al. 2019, arXiv:1904.10509, section 4.3, the second head of "strided"; theirs is causal, ours both.
    """

    key: ClassVar[str] = "strided"
    stride: int = 128

    def check_fields(self) -> None:
        check_count(self.stride, "stride", least=1)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (Window(dilation=self.stride),)

    def wide_open(self, length: int) -> "Strided":
        return Strided(stride=1)
