"""Global tokens: read by all and reading all."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import Globals, Part, Scope
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class GlobalTokens(Pattern):
    """The tokens at ``positions`` are read by all and read all; no other pair is an edge.

    Under causality each side of a pair still reads only what is before it. A ``global_mask`` given with the call
    replaces ``positions``, sample by sample. Positions beyond the end of a sequence are left out.

    Args:
        positions: logical positions, in tokens from the first real one; each at least 0.

    Source: the "global" atom (internal nodes) of Lin et al. 2021, arXiv:2106.04554, section 4.1.
    """

    key: ClassVar[str] = "global"
    positions: tuple[int, ...] = (0,)

    def check_fields(self) -> None:
        object.__setattr__(self, "positions", check_positions(self.positions, "positions"))

    @property
    def has_global_tokens(self) -> bool:
        return True

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        check_positions_fit(self.positions, "positions", length)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (Globals(positions=self.positions),)

    def for_decoder(self) -> "GlobalTokens":
        return GlobalTokens(positions=())

    def wide_open(self, length: int) -> "GlobalTokens":
        return GlobalTokens(positions=tuple(range(length)))


def check_positions_fit(positions: tuple[int, ...], name: str, length: int | None) -> None:
    """Check positions against the longest input of a model.

    Raises:
        ValueError: if one lies beyond it.
    """
    if length is not None and positions and positions[-1] >= length:
        raise ValueError(f"{name} holds {positions[-1]}, but the model reads {length} tokens: 0 to {length - 1}")


def check_positions(value: object, name: str) -> tuple[int, ...]:
    """Return positions as a sorted tuple without repeats.

    Raises:
        TypeError: if the value is not a sequence of whole numbers.
        ValueError: if one is below 0.
    """
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence of positions such as (0,), got {value!r}")
    positions = tuple(value)
    for position in positions:
        check_count(position, f"each of {name}", least=0)
    return tuple(sorted(set(positions)))
