"""Image Transformer, 1-D: blocks of the raster, each with the memory beside it."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import BlockWindow, Globals, Part, Scope
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class Image1D(Pattern):
    """Every pixel reads its block of ``block_size`` pixels in raster order and ``memory`` pixels to each side of the block.

    Causal, as in the paper, only the memory before the block is left, and of the block what is up to the pixel itself.

    Args:
        block_size: pixels of a block of queries; at least 1.
        memory: pixels beside the block; at least 0.
        num_prefix_tokens: tokens before the first pixel (CLS, registers), which read all and are read by all; at least 0.

    Source: Parmar et al. 2018, arXiv:1802.05751, section 3.2, "1D local attention". With ``memory`` equal to ``block_size`` it
    is what tensor2tensor's ``masked_local_attention_1d`` computes.
    """

    key: ClassVar[str] = "image_1d"
    block_size: int = 256
    memory: int = 256
    num_prefix_tokens: int = 0

    def check_fields(self) -> None:
        check_count(self.block_size, "block_size", least=1)
        check_count(self.memory, "memory", least=0)
        check_count(self.num_prefix_tokens, "num_prefix_tokens", least=0)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        prefix = self.num_prefix_tokens
        window = BlockWindow(block=self.block_size, before=self.memory, after=self.memory, offset=prefix)
        return (window, *prefix_tokens(prefix))

    def on_grid(self, prefix: int, height: int, width: int) -> "Image1D":
        return dataclasses.replace(
            self, num_prefix_tokens=fitted(self.num_prefix_tokens or None, prefix, "num_prefix_tokens")
        )

    def wide_open(self, length: int) -> "Image1D":
        return Image1D(length, self.memory, self.num_prefix_tokens)


def fitted(own: int | None, wanted: int, name: str) -> int:
    """Return a number of a grid that a pattern leaves open or gives rightly.

    Raises:
        ValueError: if it gives another.
    """
    if own is not None and own != wanted:
        raise ValueError(f"{name} is {own}, but the model has {wanted}; leave it out to take the model's")
    return wanted


def prefix_tokens(count: int) -> tuple[Globals, ...]:
    """Return the tokens before an image as a part: global, whatever a call marks."""
    return (Globals(positions=tuple(range(count)), is_replaceable=False),) if count else ()
