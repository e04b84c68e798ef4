"""Image Transformer, 2-D: blocks of a grid, each with a rim around it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.parts import Part, Patches, Scope
from hf_sparse.patterns.axial import check_grid, fitted_grid, grid_width
from hf_sparse.patterns.image_1d import prefix_tokens
from hf_sparse.patterns.parent import Pattern, check_choice, check_count

_ORDERS = ("raster", "block")


@dataclass(frozen=True)
class Image2D(Pattern):
    """Every pixel reads its block of the grid and a rim of pixels around that block.

    Args:
        height: rows of the grid, at least 1; None is as many as there are.
        width: columns of the grid, at least 1; None takes the grid for a square.
        query_block: rows and columns of a block of queries, at least 1 each.
        flange: rows above and below, and columns to the left and right, of the rim; at least 0 each.
        num_prefix_tokens: tokens before the first pixel (CLS, registers), which read all and are read by all; at least 0.
        order: how the sequence runs through the image: "raster", line by line; or "block", block by block and within a block
            line by line, in which causality gives the paper's generation: a rim above and to the left, and of the block
            what is before the pixel. The grid has to be made of whole blocks then.

    Source: Parmar et al. 2018, arXiv:1802.05751, section 3.2, "2D local attention"; defaults of tensor2tensor's
    ``masked_local_attention_2d``. Its bidirectional form pads the rim wrongly where the two widths differ; ours does not.
    """

    key: ClassVar[str] = "image_2d"
    height: int | None = None
    width: int | None = None
    query_block: tuple[int, int] = (8, 16)
    flange: tuple[int, int] = (8, 16)
    num_prefix_tokens: int = 0
    order: str = "raster"

    def check_fields(self) -> None:
        check_grid(self.height, self.width)
        for name, least in (("query_block", 1), ("flange", 0)):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise TypeError(f"{name} must be two numbers, rows and columns, got {value!r}")
            for side in value:
                check_count(side, f"each of {name}", least=least)
            object.__setattr__(self, name, tuple(value))
        check_count(self.num_prefix_tokens, "num_prefix_tokens", least=0)
        check_choice(self.order, "order", _ORDERS)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        prefix = self.num_prefix_tokens
        pixels = scope.length - prefix
        width = grid_width(self.height, self.width, pixels)
        if self.order == "block":
            (rows, columns), height = self.query_block, pixels // width
            height = self.height or height
            if height * width != pixels or height % rows or width % columns:
                raise ValueError(
                    f"order='block' needs a grid of whole blocks of {rows} x {columns}, got {pixels} pixels, {width} to a row"
                )
        grid = GridWindow(
            pixels=pixels,
            width=width,
            block=self.query_block,
            rim=self.flange,
            offset=prefix,
            is_by_block=self.order == "block",
        )
        return (grid, *prefix_tokens(prefix))

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        if length is not None:
            self.parts(Scope(length, num_heads))

    def on_grid(self, prefix: int, height: int, width: int) -> "Image2D":
        if self.order == "block":
            raise ValueError(
                "order='block' is for tokens in the order of blocks, but the patches of this model lie row by row"
            )
        return dataclasses.replace(self, **fitted_grid(self, prefix, height, width))

    def wide_open(self, length: int) -> "Image2D":
        return Image2D(None, length, (1, length), self.flange, self.num_prefix_tokens, "raster")


@dataclass(frozen=True, eq=False, kw_only=True)
class GridWindow(Patches):
    """Blocks of a grid, each with a rim around it.

    Attributes:
        pixels: pixels of the grid; the last row may be incomplete.
        width: columns of the grid.
        block: rows and columns of a block.
        rim: rows and columns of the rim to each side.
        offset: position of the first pixel.
        is_by_block: whether the sequence runs block by block.
    """

    pixels: int
    width: int
    block: tuple[int, int]
    rim: tuple[int, int]
    offset: int
    is_by_block: bool

    def allows(self, q: Tensor, k: Tensor) -> Tensor:
        (q_row, q_column), (k_row, k_column) = self._place(q), self._place(k)
        allowed = (q >= self.offset) & (k >= self.offset)
        for q_at, k_at, size, rim in ((q_row, k_row, 0, 0), (q_column, k_column, 1, 1)):
            start = q_at // self.block[size] * self.block[size]
            allowed = allowed & (k_at >= start - self.rim[rim]) & (k_at < start + self.block[size] + self.rim[rim])
        return allowed[None]

    def patches(self) -> Iterator[tuple[Tensor, Tensor]]:
        (rows, columns), (above, beside) = self.block, self.rim
        height = -(-self.pixels // self.width)
        for row in range(0, height, rows):
            for column in range(0, self.width, columns):
                queries = self._rectangle(row, row + rows, column, column + columns)
                keys = self._rectangle(row - above, row + rows + above, column - beside, column + columns + beside)
                if len(queries):
                    yield queries, keys

    def _rectangle(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return the positions of the pixels of a rectangle, cut at the borders of the grid, ascending."""
        height = -(-self.pixels // self.width)
        row = torch.arange(max(top, 0), min(bottom, height))[:, None]
        column = torch.arange(max(left, 0), min(right, self.width))
        if not self.is_by_block:
            at = (row * self.width + column).flatten()
            return at[at < self.pixels] + self.offset
        (rows, columns), across = self.block, self.width // self.block[1]
        block = row // rows * across + column // columns
        at = block * rows * columns + row % rows * columns + column % columns
        return at.flatten().sort().values + self.offset

    def _place(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of positions."""
        at = position - self.offset
        if not self.is_by_block:
            return at // self.width, at % self.width
        (rows, columns), across = self.block, self.width // self.block[1]
        block, inside = at // (rows * columns), at % (rows * columns)
        row = block // across * rows + inside // columns
        return row, block % across * columns + inside % columns
