"""Random blocks: every block of queries reads a few blocks drawn at random."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, Part, Scope
from hf_sparse.patterns.block_local import check_block_fits
from hf_sparse.patterns.parent import Pattern, check_count, check_seed


@dataclass(frozen=True)
class RandomBlocks(Pattern):
    """Every block of queries reads ``num_random_blocks`` blocks drawn at random, anew for each layer and head.

    The draw is a pure function of seed, layer, head and block, so it is the same in training, in evaluation and in every
    process. It is stable under growth: a longer sequence only ever replaces a drawn block by one beyond the old end,
    and under causality, where blocks before the query's own are drawn, it replaces none. A sequence with too few blocks
    gets all there are.

    Args:
        block_size: tokens of a block; at least 1.
        num_random_blocks: blocks drawn for each block of queries; at least 0.
        seed: of the draw; at least 0.

    Source: the "random" atom of Lin et al. 2021, arXiv:2106.04554, section 4.1, in blocks as in Zaheer et al. 2020,
    arXiv:2007.14062. The draw is our own: theirs depends on the length.
    """

    key: ClassVar[str] = "random"
    block_size: int = 64
    num_random_blocks: int = 3
    seed: int = 0

    def check_fields(self) -> None:
        check_count(self.block_size, "block_size", least=1)
        check_count(self.num_random_blocks, "num_random_blocks", least=0)
        check_seed(self.seed)

    @property
    def varies_by_layer(self) -> bool:
        return True

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        blocks = -(-scope.length // self.block_size)
        row = torch.arange(blocks)
        choices = row if scope.is_causal else torch.full_like(row, blocks)
        table = draw_blocks(choices, self.num_random_blocks, seed=self.seed, scope=scope)
        return (BlockTable(block=self.block_size, table=table),)

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        check_block_fits(self.block_size, length)

    def wide_open(self, length: int) -> "RandomBlocks":
        return RandomBlocks(block_size=length, num_random_blocks=1, seed=self.seed)


def draw_blocks(choices: Tensor, count: int, *, seed: int, scope: Scope) -> Tensor:
    """Draw distinct numbers below ``choices`` for every head and row, stable as ``choices`` grows.

    Slot s of a row draws evenly from the numbers that are s modulo ``count``. It walks through the records of a
    hash: the next number to beat the present one is ``floor((m + 1) / u)`` for a hash ``u`` in (0, 1), so a slot
    costs O(log choices) and keeps its number until a record falls inside the grown range.

    Args:
        choices: int64 ``[NQ]``, how many numbers each row draws from; 0 draws none.
        count: numbers for each row, at least 0.
        seed: of the hash.
        scope: gives the layer and the heads.

    Returns:
        int64 ``[H, NQ, count]``; -1 where there was nothing left to draw.
    """
    head = torch.arange(scope.head_offset, scope.head_offset + scope.heads)[:, None, None]
    row = torch.arange(len(choices))[None, :, None]
    slot = torch.arange(count)[None, None, :]
    available = (choices[None, :, None] - slot + count - 1).div(max(count, 1), rounding_mode="floor")
    counter = torch.tensor(seed)
    for word in (torch.tensor(scope.layer), head, row, slot):
        counter = _scramble(counter + word + 1)
    drawn = torch.zeros((scope.heads, len(choices), count), dtype=torch.int64)
    while True:
        counter = _scramble(counter + 1)
        # 52 random bits, never 0 and never 1
        u = ((counter & ((1 << 52) - 1)).double() + 0.5) / (1 << 52)
        following = ((drawn + 1).double() / u).clamp(max=2**40).long()
        moves = following < available
        if not moves.any():
            break
        # a slot that once stays stays for good: its next record lies beyond the end
        available = torch.where(moves, available, torch.zeros_like(available).expand_as(drawn))
        drawn = torch.where(moves, following, drawn)
    is_drawn = slot < choices[None, :, None]
    return torch.where(is_drawn, drawn * count + slot, torch.full_like(drawn, -1))


def _scramble(x: Tensor) -> Tensor:
    """Return a 64-bit hash of int64 numbers.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014), in two's complement.
    """

    def shifted(value: Tensor, by: int) -> Tensor:
        return (value >> by) & ((1 << (64 - by)) - 1)

    x = x + -7046029254386353131
    x = (x ^ shifted(x, 30)) * -4658895280553007687
    x = (x ^ shifted(x, 27)) * -7723592293110705685
    return x ^ shifted(x, 31)
