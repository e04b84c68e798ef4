"""Dilated: a band with gaps."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import Part, Scope, Window
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class Dilated(Pattern):
    """Every token reads ``radius`` tokens to each side, ``dilation`` apart: 2 * radius + 1 keys (causal: radius + 1).

    Args:
        radius: keys to each side; at least 0.
        dilation: distance between neighbouring keys, in tokens; at least 1 (1 is a band).

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1 ("dilated sliding window").
    """

    key: ClassVar[str] = "dilated"
    radius: int = 256
    dilation: int = 2

    def check_fields(self) -> None:
        check_count(self.radius, "radius", least=0)
        check_count(self.dilation, "dilation", least=1)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (Window(before=self.radius, after=self.radius, dilation=self.dilation),)

    def wide_open(self, length: int) -> "Dilated":
        return Dilated(radius=length, dilation=1)
