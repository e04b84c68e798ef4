"""Tables of blocks: what planning does with them before they are cut into tiles."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sparse.parts import BlockTable, BlockWindow, Part

# blocks of global tokens that are read together with a table; more of them are cheaper in a tile of their own
MOST_JOINED = 4
# stretches of rows with equally many blocks; where there are more, rows are filled up and masked
MOST_STRETCHES = 8


def join_blocks(parts: Sequence[Part], is_global: Tensor) -> BlockTable | None:
    """Join a window of blocks, a table and global blocks, as BigBird has them, into one table: one pass instead of three.

    Args:
        parts: the parts of one group of heads, without its global tokens.
        is_global: bool ``[n]``, the global tokens.

    Returns:
        A table that reads all of them, or None where the parts are of another form.
    """
    tables = [part for part in parts if isinstance(part, BlockTable)]
    windows = [part for part in parts if isinstance(part, BlockWindow)]
    if len(tables) != 1 or len(windows) > 1 or len(parts) != 1 + len(windows) or parts[-1].heads != parts[0].heads:
        return None
    size, held = tables[0].block, tables[0].table
    rows = -(-len(is_global) // size)
    blocks = torch.nn.functional.pad(is_global, (0, rows * size - len(is_global))).view(rows, size)
    lengths = torch.full((rows,), size).clamp(max=len(is_global) - size * torch.arange(rows))
    columns = blocks.any(1).nonzero()[:, 0]
    if any(window.block != size or not window.is_of_blocks for window in windows) or len(columns) > MOST_JOINED:
        return None
    if bool((blocks.sum(1) != lengths)[columns].any()):
        return None
    row = torch.arange(rows)[:, None]
    joined = [held[:, :rows], columns.expand(held.shape[0], rows, -1)]
    for window in windows:
        beside = row + torch.arange(-window.before // size, window.after // size + 1)
        joined.append(beside.masked_fill((beside < 0) | (beside >= rows), -1).expand(held.shape[0], -1, -1))
    return BlockTable(heads=tables[0].heads, block=size, table=torch.cat(joined, 2))


def own_blocks(
    part: BlockTable, earlier: Sequence[Part], length: int, head: int, *, is_causal: bool
) -> tuple[Tensor, list[Part]]:
    """Return the blocks that each row of a table reads and no earlier part has.

    Args:
        part: the table.
        earlier: the parts before it.
        length: tokens.
        head: whose table.
        is_causal: whether blocks ahead of the row are left out.

    Returns:
        int64 ``[rows, W]``, each block once, the -1 last; and those earlier parts that may still hold pairs of these blocks.
    """
    size, rows = part.block, -(-length // part.block)
    table = part.table[head if part.table.shape[0] > 1 else 0, :rows].clone()
    table[table >= rows] = -1
    row = torch.arange(rows)[:, None]
    if is_causal:
        table[table > row] = -1
    left = []
    for other in earlier:
        # what an earlier part of the same blocks has is struck out whole, so that no mask has to do it
        if isinstance(other, BlockWindow) and other.block == size and other.is_of_blocks:
            table[(row - table <= other.before // size) & (table - row <= other.after // size)] = -1
        elif isinstance(other, BlockTable) and other.block == size:
            held = other.table[head if other.table.shape[0] > 1 else 0, :rows]
            table[(table[:, :, None] == held[:, None, :]).any(2)] = -1
        else:
            left.append(other)
    table = table.sort(dim=1, descending=True).values
    table[:, 1:][table[:, 1:] == table[:, :-1]] = -1
    return table.sort(dim=1, descending=True).values, left


def stretches(table: Tensor, length: int, size: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, last row + 1 and blocks ``[rows, W]`` of stretches of rows that run together.

    Rows in a stretch read equally many blocks, where that takes few stretches; rows that read nothing are left out. A last
    block that is not whole is a stretch of its own.
    """
    counts = (table >= 0).sum(1)
    ends = ((counts[1:] != counts[:-1]).nonzero()[:, 0] + 1).tolist()
    if len(ends) >= MOST_STRETCHES:
        ends = []
    rows = len(table)
    if length % size and rows - 1 not in ends:
        ends.append(rows - 1)
    for start, stop in zip([0, *ends], [*ends, rows], strict=True):
        width = int(counts[start:stop].max()) if stop > start else 0
        if width:
            yield start, stop, table[start:stop, :width]
