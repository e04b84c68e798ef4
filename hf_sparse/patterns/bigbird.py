"""BigBird: a window of blocks, global end blocks, random blocks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy
import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Globals, Part, Scope
from hf_sparse.patterns.block_local import check_block_fits
from hf_sparse.patterns.etc import even_spans
from hf_sparse.patterns.parent import Pattern, check_choice, check_count, check_seed
from hf_sparse.patterns.random_blocks import draw_blocks
from hf_sparse.patterns.star import node_globals


@dataclass(frozen=True)
class BigBird(Pattern):
    """Every block reads itself, its two neighbours, the first and last block and a few random ones; the ends read all.

    Causal (the paper defines none): blocks up to the query's own; the first block alone is global; random blocks lie
    before the window.

    Args:
        block_size: tokens of a block; at least 1.
        num_random_blocks: random blocks for each block of queries; at least 0. Anew for each layer and head.
        seed: of the random blocks; at least 0. Under "published" layer l draws with ``seed + l``, as the checkpoints do.
        random_plan: "published" repeats the published draw, in which random blocks come from the first 1024 tokens at
            1024, 2048, 3072 and 4096 tokens, and nearly always from the first blocks elsewhere. "full_length" draws
            from the whole sequence and is stable as the sequence grows (see ``RandomBlocks``). "evaluation" computes what the
            in-tree model does in evaluation: in the place of each random block the first block once more, which so counts
            ``1 + num_random_blocks`` times in the softmax of all rows but those of the first and last block. It needs
            ``length="padded"`` and is not causal, as that model.
        length: "real" lays the blocks over a sample's real tokens; "padded" over the padded length, as published, so
            that the last block may be padding and a sample's output depends on the batch it is in.
        num_external_global: global nodes that are no tokens, at least 0. Above 0 they take the place of the global first
            and last block: the paper's ETC form. Causal, they read one another alone.

    Source: Zaheer et al. 2020, arXiv:2007.14062, section 2: the ITC form, and the ETC form with external nodes. A pair is
    counted once but under "evaluation"; the published gather counts some pairs twice at 1024 tokens.
    """

    key: ClassVar[str] = "bigbird"
    block_size: int = 64
    num_random_blocks: int = 3
    seed: int = 0
    random_plan: str = "published"
    length: str = "real"
    num_external_global: int = 0

    def check_fields(self) -> None:
        check_count(self.block_size, "block_size", least=1)
        check_count(self.num_random_blocks, "num_random_blocks", least=0)
        check_seed(self.seed)
        check_count(self.num_external_global, "num_external_global", least=0)
        check_choice(self.random_plan, "random_plan", ("published", "full_length", "evaluation"))
        check_choice(self.length, "length", ("real", "padded"))
        if self.random_plan == "evaluation" and (self.length != "padded" or self.num_external_global):
            raise ValueError(
                "random_plan 'evaluation' computes what the in-tree model does in evaluation, which lays its blocks over the "
                "padded length and has no nodes; set length='padded' and num_external_global=0, or take another plan"
            )

    def num_nodes(self, n: int) -> int:
        return self.num_external_global

    @property
    def num_node_vectors(self) -> int:
        return max(self.num_external_global, 1)

    def node_spans(self, n: int) -> Tensor:
        return even_spans(n, self.num_external_global)

    @property
    def reads_padding(self) -> bool:
        return self.length == "padded"

    @property
    def varies_by_layer(self) -> bool:
        return True

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        size = self.block_size
        blocks = -(-scope.length // size)
        ends = list(range(min(size, scope.length)))
        if not scope.is_causal:
            ends += range((blocks - 1) * size, scope.length)
        globals_ = Globals(positions=tuple(sorted(set(ends))), is_replaceable=False)
        return (
            BlockWindow(block=size, before=size, after=size),
            BlockTable(block=size, table=self._random_table(scope, blocks)),
            node_globals(scope, self.num_external_global) if self.num_external_global else globals_,
        )

    def added_scores(self, n: int) -> tuple[Tensor, Tensor] | None:
        if self.random_plan != "evaluation":
            return None
        block = torch.arange(n) // self.block_size
        is_between = (block > 0) & (block < -(-n // self.block_size) - 1)
        return is_between.double(), (block == 0).double() * math.log1p(self.num_random_blocks)

    def _random_table(self, scope: Scope, blocks: int) -> Tensor:
        if self.random_plan == "evaluation":
            return torch.full((1, blocks, 1), -1)
        row = torch.arange(blocks)
        if self.random_plan == "full_length" or scope.is_causal or not self.num_random_blocks:
            # candidates: blocks 1 ... row - 2 and, if not causal, row + 2 ... blocks - 2
            behind = (row - 2).clamp(min=0)
            ahead = torch.zeros_like(row) if scope.is_causal else (blocks - 3 - row).clamp(min=0)
            drawn = draw_blocks(behind + ahead, self.num_random_blocks, seed=self.seed, scope=scope)
            behind, row = behind[None, :, None], row[None, :, None]
            block = torch.where(drawn < behind, drawn + 1, drawn - behind + row + 2)
            return torch.where(drawn < 0, drawn, block)
        held = slice(scope.head_offset, scope.head_offset + scope.heads)
        # the published draw goes through the heads row by row, so it takes all of them
        table = torch.full((scope.num_heads or held.stop, blocks, self.num_random_blocks), -1, dtype=torch.int64)
        # numpy takes seeds of 32 bits
        generator = numpy.random.RandomState((self.seed + scope.layer) % 2**32)
        plan = _early_plan if blocks * self.block_size in _EARLY_LENGTHS else _section_plan
        plan(table, generator, self.block_size)
        return table[held]

    def check(self, *, num_layers: int, num_heads: int, length: int | None = None) -> None:
        check_block_fits(self.block_size, length)

    def wide_open(self, length: int) -> "BigBird":
        return dataclasses.replace(self, block_size=length)


# lengths at which the published checkpoints were trained, and the length their plan was drawn for
_EARLY_LENGTHS = (1024, 2048, 3072, 4096)
_EARLY_LIMIT = 1024


def _early_plan(table: Tensor, generator: "numpy.random.RandomState", block_size: int) -> None:
    """Fill the table as at the paper's lengths: drawn for 4096 tokens, from the blocks of the first 1024, then cut.

    A draw may hit the last block of a sequence of 1024 tokens, which is global as well; as a set that changes nothing.
    """
    blocks = _EARLY_LENGTHS[-1] // block_size
    last = _EARLY_LIMIT // block_size - 1 if 2 * block_size < _EARLY_LIMIT else blocks - 1
    for head in range(table.shape[0]):
        for row in range(1, blocks - 1):
            # the two rows before the last keep their window among the candidates: so it was published
            keeps_window = row >= blocks - 3 and row > 2
            candidates = [j for j in range(1, min(last, blocks - 2) + 1) if keeps_window or abs(j - row) > 1]
            chosen = generator.permutation(candidates)[: table.shape[2]]
            if row < table.shape[1] - 1:
                table[head, row, : len(chosen)] = torch.as_tensor(chosen, dtype=torch.int64)


def _section_plan(table: Tensor, generator: "numpy.random.RandomState", block_size: int) -> None:
    """Fill the table as at every other length: each row draws from one or two sections of the sequence."""
    heads, blocks, count = table.shape
    if 2 * count + 5 < blocks:
        sections = [(0, 2 * count + 5, count)]
    elif count + 5 < blocks:
        sections = [(0, count + 5, count // 2), (count + 5, blocks, count - count // 2)]
    else:
        sections = [(0, blocks, count)]
    sections = [section for section in sections if section[2]]
    bound = sections[0][1] if sections else 0
    # rows of the first section draw from each section in turn before rows of the rest do: the order of the draws counts
    spans = [(range(1, bound), section) for section in sections] + [(range(bound, blocks), s) for s in sections]
    if len(sections) == 1 and sections[0][0] > 0:
        spans = [(range(1, sections[0][0]), sections[0]), (range(sections[0][0], blocks), sections[0])]
    for rows, (start, stop, wanted) in spans:
        column = 0 if start == 0 else count - wanted
        for row in rows:
            illegal = {row - 1, row, row + 1, 0, stop - 1}
            illegal |= {stop - 2} if row == 1 else set()
            illegal |= {1} if row == stop - 2 else set()
            for head in range(heads):
                legal = [int(j) for j in generator.permutation(range(start, stop)) if j not in illegal]
                for slot, block in enumerate(legal[:wanted]):
                    table[head, row, column + slot] = block
