"""Who reads whom in the named systems, nodes included: the papers' definitions as plain predicates, drawn by loops.

Tokens are 0 ... n - 1 and nodes lie behind them, n ... n + m - 1. Every function returns bool
``[heads, n + m, n + m]``, True where the query (row) reads the key (column); one head where all heads are alike.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from tests.support.rules import Rule, draw

# (query, key), counted from the first pixel -> whether the query reads the key
PixelRule = Callable[[int, int], bool]


def star(n: int, *, radius: int = 1, num_relays: int = 1, cyclic: bool = True, is_causal: bool = False) -> Tensor:
    """Tokens on a ring read their neighbours and the relays; relays read everything. Causal: relays read relays.

    Source: Guo et al. 2019, arXiv:1902.09113, section 3.2.
    """

    def reads(h: int, q: int, k: int) -> bool:
        if q >= n:
            return k >= n or not is_causal
        if k >= n:
            return True
        if is_causal:
            return 0 <= q - k <= radius
        apart = abs(q - k)
        return min(apart, n - apart) <= radius if cyclic else apart <= radius

    return draw(reads, n + num_relays)


def etc(
    n: int,
    *,
    radius: int,
    num_global: int = 0,
    segments: int | None = None,
    hard_global_to_long: bool = False,
    hard_long_to_global: bool = False,
    is_causal: bool = False,
) -> Tensor:
    """Long tokens read their neighbours; global tokens read all and are read by all, or by those of their segment.

    Source: Ainslie et al. 2020, arXiv:2004.08483, sections 3.2 and 3.3.
    """
    nodes = num_global if segments is None else -(-n // segments)

    def reads(h: int, q: int, k: int) -> bool:
        if q < n and k < n:
            return abs(q - k) <= radius and (k <= q or not is_causal)
        if q >= n and k >= n:
            return True
        if q < n:
            return not hard_long_to_global or segments is None or q // segments == k - n
        if is_causal:
            return False
        return not hard_global_to_long or segments is None or k // segments == q - n

    return draw(reads, n + nodes)


def bigbird_external(
    n: int, block: int, table: Sequence[Sequence[set[int]]], num_external: int, *, is_causal: bool = False
) -> Tensor:
    """Window of three blocks and random blocks of a table ``[head][query block]``; the nodes alone are global.

    Source: Zaheer et al. 2020, arXiv:2007.14062, section 2, the ETC form.
    """

    def reads(h: int, q: int, k: int) -> bool:
        if q >= n:
            return k >= n or not is_causal
        if k >= n:
            return True
        i, j = q // block, k // block
        return (abs(i - j) <= 1 or j in table[h][i]) and (k <= q or not is_causal)

    return draw(reads, n + num_external, heads=len(table))


def sparse_transformer(
    n: int,
    *,
    kind: str,
    stride: int,
    summary: int = 1,
    heads_mode: str = "merged",
    local_window: str = "paper",
    num_heads: int = 1,
    layer: int = 0,
    is_causal: bool = False,
) -> Tensor:
    """One set of keys lies near, the other far apart; heads or layers have both, or one of them.

    Source: Child et al. 2019, arXiv:1904.10509, sections 4.2 and 4.3.
    """
    near_heads = (num_heads + 1) // 2

    def near(q: int, k: int) -> bool:
        if kind == "fixed":
            return q // stride == k // stride
        return abs(q - k) <= stride if local_window == "paper" else abs(q - k) < stride

    def far(q: int, k: int, slot: int) -> bool:
        if kind == "strided":
            return (q - k) % stride == 0
        return stride - summary * (slot + 1) <= k % stride < stride - summary * slot

    def reads(h: int, q: int, k: int) -> bool:
        if heads_mode == "merged":
            return near(q, k) or far(q, k, 0)
        if heads_mode == "interleaved":
            return far(q, k, 0) if layer % 2 else near(q, k)
        if h < near_heads:
            return near(q, k)
        return far(q, k, (h - near_heads) % (stride // summary))

    return draw(reads, n, heads=num_heads, is_causal=is_causal)


def image_1d(n: int, *, block_size: int, memory: int, num_prefix_tokens: int = 0, is_causal: bool = False) -> Tensor:
    """Pixels in a row read their own block and ``memory`` pixels to each side of it.

    Source: Parmar et al. 2018, arXiv:1802.05751, section 3.2, 1D local attention.
    """

    def reads(q: int, k: int) -> bool:
        block = q // block_size
        return block * block_size - memory <= k < (block + 1) * block_size + memory

    return draw(_behind_prefix(reads, num_prefix_tokens), n, is_causal=is_causal)


def image_2d(
    n: int,
    *,
    height: int | None = None,
    width: int | None = None,
    query_block: tuple[int, int],
    flange: tuple[int, int],
    order: str = "raster",
    num_prefix_tokens: int = 0,
    is_causal: bool = False,
) -> Tensor:
    """Pixels read the rectangle of their own block and a flange around it; ``height`` plays no part in who reads whom.

    Source: Parmar et al. 2018, arXiv:1802.05751, section 3.2, 2D local attention.
    """
    columns = _width(n - num_prefix_tokens, width)
    high, wide = query_block

    def place(i: int) -> tuple[int, int]:
        if order == "raster":
            return i // columns, i % columns
        block, inside = i // (high * wide), i % (high * wide)
        block_row, block_column = block // (columns // wide), block % (columns // wide)
        return block_row * high + inside // wide, block_column * wide + inside % wide

    places = [place(i) for i in range(n - num_prefix_tokens)]

    def reads(q: int, k: int) -> bool:
        (query_row, query_column), (row, column) = places[q], places[k]
        top, left = query_row // high * high, query_column // wide * wide
        is_row_near = top - flange[0] <= row < top + high + flange[0]
        is_column_near = left - flange[1] <= column < left + wide + flange[1]
        return is_row_near and is_column_near

    return draw(_behind_prefix(reads, num_prefix_tokens), n, is_causal=is_causal)


def axial(
    n: int,
    *,
    height: int | None = None,
    width: int | None = None,
    axis: str = "alternate",
    layer: int = 0,
    num_prefix_tokens: int = 0,
    is_causal: bool = False,
) -> Tensor:
    """Pixels read their row or their column; ``height`` plays no part in who reads whom.

    Source: Ho et al. 2019, arXiv:1912.12180, section 3.
    """
    columns = _width(n - num_prefix_tokens, width)
    is_row = axis == "row" or (axis == "alternate" and layer % 2 == 0)

    def reads(q: int, k: int) -> bool:
        return q // columns == k // columns if is_row else q % columns == k % columns

    return draw(_behind_prefix(reads, num_prefix_tokens), n, is_causal=is_causal)


def tree_levels(n: int) -> list[list[int]]:
    """Return the positions of the nodes of each level, the tokens as level 0 and the root last."""
    levels = [list(range(n))]
    behind = n
    while len(levels[-1]) > 1:
        count = -(-n // 2 ** len(levels))
        levels.append(list(range(behind, behind + count)))
        behind += count
    return levels


def number_of_nodes(n: int) -> int:
    """Return how many span nodes lie behind ``n`` tokens."""
    return sum(len(level) for level in tree_levels(n)[1:])


def leaves_of_nodes(n: int) -> list[list[int]]:
    """Return the tokens under each position, a token's own being itself."""
    return [
        [leaf for leaf in range(n) if leaf // 2**height == index]
        for height, level in enumerate(tree_levels(n))
        for index in range(len(level))
    ]


def left_contexts(leaf: int, levels: list[list[int]], nodes_per_level: int) -> list[int]:
    """Walk from a leaf to the left and upwards: at each level so many nodes, a child left alone first."""
    taken = []
    alone = None
    at = leaf - 1
    for level in levels:
        slots = nodes_per_level
        if alone is not None:
            taken.append(alone)
            # its parent overlaps what is covered
            at -= 1
            slots -= 1
        for _ in range(slots):
            if at >= 0:
                taken.append(level[at])
            at -= 1
        # a left child whose sibling is covered
        alone = level[at] if at >= 0 and at % 2 == 0 else None
        at //= 2
    return taken


def right_contexts(leaf: int, levels: list[list[int]], nodes_per_level: int, leaves: list[list[int]]) -> list[int]:
    """Walk to the right, the mirror of the left; nodes that do not exist or overlap what is covered are not taken."""
    taken: list[int] = []
    covered = set(range(leaf + 1))

    def take(node: int) -> None:
        if covered.isdisjoint(leaves[node]):
            taken.append(node)
            covered.update(leaves[node])

    alone = None
    at = leaf + 1
    for level in levels:
        slots = nodes_per_level
        if alone is not None:
            take(alone)
            at += 1
            slots -= 1
        for _ in range(slots):
            if at < len(level):
                take(level[at])
            at += 1
        # a right child whose sibling is covered
        alone = level[at] if at < len(level) and at % 2 == 1 else None
        at //= 2
    return taken


def bp_transformer(n: int, *, nodes_per_level: int, is_causal: bool = False) -> Tensor:
    """Leaves read themselves and ever larger spans to both sides, to the left if causal; spans read their leaves.

    Source: Ye et al. 2019, arXiv:1911.04070, section 3.1; made exact at lengths that are no power of two.
    """
    levels, leaves = tree_levels(n), leaves_of_nodes(n)
    read = []
    for leaf in range(n):
        own = {leaf, *left_contexts(leaf, levels, nodes_per_level)}
        if not is_causal:
            own |= set(right_contexts(leaf, levels, nodes_per_level, leaves))
        read.append(own)
    read += [set(under) for under in leaves[n:]]
    return draw(lambda h, q, k: k in read[q], len(read))


def _behind_prefix(reads: PixelRule, num_prefix_tokens: int) -> Rule:
    """Put global tokens in front of the pixels; the pixels are counted from 0 behind them."""
    first = num_prefix_tokens
    return lambda h, q, k: q < first or k < first or reads(q - first, k - first)


def _width(pixels: int, width: int | None) -> int:
    """Return the width given, or that of a square."""
    return width or next(side for side in range(pixels + 1) if side * side == pixels)
