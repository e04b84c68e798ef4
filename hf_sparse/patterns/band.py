"""Band: every token reads its neighbours."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import Part, Scope, Window
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class Band(Pattern):
    """Every token reads the tokens at most ``radius`` away: 2 * radius + 1 keys (causal: radius + 1).

    Args:
        radius: reach to each side, in tokens; at least 0.

    Source: the "band" atom of Lin et al. 2021 (A Survey of Transformers, arXiv:2106.04554, section 4.1). Transformers'
    ``sliding_window=w`` is ``radius=w - 1`` causal; Longformer's ``window=w`` is ``radius=w // 2``.
    """

    key: ClassVar[str] = "band"
    radius: int = 256

    def check_fields(self) -> None:
        check_count(self.radius, "radius", least=0)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (Window(before=self.radius, after=self.radius),)

    def wide_open(self, length: int) -> "Band":
        return Band(radius=length)
