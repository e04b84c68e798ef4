"""Axial Transformer: rows and columns of a grid."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from hf_sparse.parts import BlockWindow, Part, Scope, Window
from hf_sparse.patterns.image_1d import fitted, prefix_tokens
from hf_sparse.patterns.parent import Pattern, check_choice, check_count

if TYPE_CHECKING:
    from hf_sparse.patterns.image_2d import Image2D

_AXES = ("row", "column", "alternate")


@dataclass(frozen=True)
class Axial(Pattern):
    """Every pixel of a raster reads its row or its column.

    Rows are stretches of the raster and columns are views with a stride, so nothing is masked or copied. Two layers, one of
    each, connect every pair. Causal leaves what is before a pixel in its row or column; pixels above and to the right are
    then out of reach, which is what ``shifted_axial`` mends.

    Args:
        height: rows of the grid, at least 1; None is as many as there are.
        width: columns of the grid, at least 1; None takes the grid for a square.
        axis: "row", "column", or "alternate" (even layers rows, odd layers columns).
        num_prefix_tokens: tokens before the first pixel (CLS, registers), which read all and are read by all; at least 0.

    Source: Ho et al. 2019, arXiv:1912.12180, section 3.
    """

    key: ClassVar[str] = "axial"
    height: int | None = None
    width: int | None = None
    axis: str = "alternate"
    num_prefix_tokens: int = 0

    def check_fields(self) -> None:
        check_grid(self.height, self.width)
        check_choice(self.axis, "axis", _AXES)
        check_count(self.num_prefix_tokens, "num_prefix_tokens", least=0)

    @property
    def varies_by_layer(self) -> bool:
        return self.axis == "alternate"

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        prefix = self.num_prefix_tokens
        width = grid_width(self.height, self.width, scope.length - prefix)
        is_row = self.axis == "row" or (self.axis == "alternate" and scope.layer % 2 == 0)
        line = BlockWindow(block=width, offset=prefix) if is_row else Window(dilation=width)
        return (line, *prefix_tokens(prefix))

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        if self.axis == "alternate" and num_layers < 2:
            raise ValueError(f"axis='alternate' needs at least 2 layers, but the model has {num_layers}")
        if length is not None:
            grid_width(self.height, self.width, length - self.num_prefix_tokens)

    def on_grid(self, prefix: int, height: int, width: int) -> "Axial":
        return dataclasses.replace(self, **fitted_grid(self, prefix, height, width))

    def wide_open(self, length: int) -> "Axial":
        return Axial(None, length, "row", self.num_prefix_tokens)


def shifted_axial(
    hidden: Tensor,
    *,
    width: int,
    whole_rows: Callable[[Tensor], Tensor],
    columns: Callable[[Tensor], Tensor],
    rows: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return states from which an image can be generated pixel by pixel: each knows all pixels before it, and no other.

    Causal rows and columns alone never see what is above and to the right. Here rows are first read whole and then joined down
    the columns; moved down by one row, that says all of the rows above. What is to the left comes from causal rows over
    the pixels moved right by one.

    Args:
        hidden: float ``[B, height * width, D]``, the embedded pixels in raster order, their positions included.
        width: pixels of a row.
        whole_rows: layers under ``Axial(axis="row")``, not causal: float ``[B, N, D]`` to the same.
        columns: causal layers under ``Axial(axis="column")``.
        rows: causal layers under ``Axial(axis="row")``.

    Raises:
        ValueError: if the pixels are no whole rows.

    Source: Ho et al. 2019, arXiv:1912.12180, section 3.2. Positions, which the paper adds once more between, are left to the
    layers; so is the order of channels.
    """
    if width < 1 or hidden.shape[1] % width:
        raise ValueError(f"width must divide the {hidden.shape[1]} pixels into whole rows, got {width}")
    above = nn.functional.pad(columns(whole_rows(hidden)), (0, 0, width, -width))
    left = nn.functional.pad(hidden.unflatten(1, (-1, width)), (0, 0, 1, -1)).flatten(1, 2)
    return rows(left + above)


def fitted_grid(pattern: "Axial | Image2D", prefix: int, height: int, width: int) -> dict[str, Any]:
    """Return the fields of a grid that a pattern leaves open or gives rightly; arguments and errors as for ``on_grid``."""
    return {
        "height": fitted(pattern.height, height, "height"),
        "width": fitted(pattern.width, width, "width"),
        "num_prefix_tokens": fitted(pattern.num_prefix_tokens or None, prefix, "num_prefix_tokens"),
    }


def check_grid(height: int | None, width: int | None) -> None:
    """Check the sides of a grid, each a count or None."""
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_count(side, name, least=1)


def grid_width(height: int | None, width: int | None, pixels: int) -> int:
    """Return the columns of a grid.

    Args:
        height: rows, or None.
        width: columns, or None for a square.
        pixels: pixels that are there.

    Raises:
        ValueError: if the pixels make no square where one is needed, or do not fit the grid.
    """
    if width is None and height is not None and pixels % height == 0:
        width = pixels // height
    if width is None:
        width = round(max(pixels, 0) ** 0.5)
        if width * width != pixels:
            raise ValueError(
                f"width must be set: {pixels} tokens behind the prefix are no square grid; set width, or num_prefix_tokens to "
                "the tokens before the first pixel"
            )
    if height is not None and pixels > height * width:
        raise ValueError(f"height {height} and width {width} hold {height * width} pixels, but there are {pixels}")
    return max(width, 1)
