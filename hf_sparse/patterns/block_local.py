"""Block-local: every token reads its own block."""

from dataclasses import dataclass
from typing import ClassVar

from hf_sparse.parts import BlockWindow, Part, Scope
from hf_sparse.patterns.parent import Pattern, check_count


@dataclass(frozen=True)
class BlockLocal(Pattern):
    """Every token reads the block of ``block_size`` tokens that it stands in; the last block may be shorter.

    Args:
        block_size: tokens of a block; at least 1.

    Source: the "block local" atom of Lin et al. 2021, arXiv:2106.04554, section 4.1.
    """

    key: ClassVar[str] = "block_local"
    block_size: int = 256

    def check_fields(self) -> None:
        check_count(self.block_size, "block_size", least=1)

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        return (BlockWindow(block=self.block_size),)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        check_block_fits(self.block_size, length)

    def wide_open(self, length: int) -> "BlockLocal":
        return BlockLocal(block_size=length)


def check_block_fits(block_size: int, length: int | None) -> None:
    """Check a block against the longest input of a model.

    Raises:
        ValueError: if the block is larger.
    """
    if length is not None and block_size > length:
        raise ValueError(f"block_size {block_size} is larger than the model's maximum length {length}")
