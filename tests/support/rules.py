"""Who reads whom, one question at a time: the definitions of the patterns as plain predicates, drawn by loops."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# (head, query, key) -> whether the query reads the key, causality aside
Rule = Callable[[int, int, int], bool]


def draw(rule: Rule, n: int, *, heads: int = 1, is_causal: bool = False) -> Tensor:
    """Ask a rule about every pair.

    Returns:
        bool ``[heads, n, n]``; True where the query (row) reads the key (column).
    """
    rows = [[[(k <= q or not is_causal) and rule(h, q, k) for k in range(n)] for q in range(n)] for h in range(heads)]
    return torch.tensor(rows, dtype=torch.bool)


def from_rows(*rows: str) -> Tensor:
    """Read a mask drawn by hand, one string a query: ``x`` reads, ``.`` does not."""
    return torch.tensor([[[mark == "x" for mark in row] for row in rows]])


def band(radius: int) -> Rule:
    """Keys at most ``radius`` away."""
    return lambda h, q, k: -radius <= q - k <= radius


def dilated(radius: int, dilation: int) -> Rule:
    """``radius`` keys to each side, ``dilation`` apart."""
    steps = {dilation * j for j in range(-radius, radius + 1)}
    return lambda h, q, k: k - q in steps


def strided(stride: int) -> Rule:
    """Keys whose distance is a multiple of ``stride``."""
    return lambda h, q, k: abs(q - k) % stride == 0


def block_local(block: int) -> Rule:
    """Keys of the query's own block."""
    return lambda h, q, k: q // block == k // block


def global_tokens(positions: Sequence[int]) -> Rule:
    """Tokens read by all and reading all."""
    held = set(positions)
    return lambda h, q, k: q in held or k in held


def random_blocks(block: int, table: Sequence[Sequence[set[int]]]) -> Rule:
    """Blocks named by a table ``[head][query block]``."""
    return lambda h, q, k: k // block in table[h][q // block]


def longformer(
    window: int | Sequence[int],
    positions: Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    layer: int = 0,
) -> Rule:
    """Half a window to each side and the global tokens; a window for each layer, a dilation for each head."""
    side = (window if isinstance(window, int) else window[layer]) // 2
    held = set(positions)
    apart = [dilation] if isinstance(dilation, int) else dilation
    steps = [{step * j for j in range(-side, side + 1)} for step in apart]
    return lambda h, q, k: q in held or k in held or k - q in steps[h % len(steps)]


def bigbird(block: int, n: int, table: Sequence[Sequence[set[int]]], *, is_causal: bool) -> Rule:
    """Window of three blocks, first and last block global, random blocks; causal: the first block alone is global."""
    last = (n + block - 1) // block - 1
    ends = {0} if is_causal else {0, last}

    def reads(h: int, q: int, k: int) -> bool:
        i, j = q // block, k // block
        return i in ends or j in ends or abs(i - j) <= 1 or j in table[h][i]

    return reads


def union(*rules: Rule) -> Rule:
    """Pairs of any member."""
    return lambda h, q, k: any(rule(h, q, k) for rule in rules)


def by_head(rules: Mapping[int, Rule]) -> Rule:
    """A rule of its own for each head."""
    return lambda h, q, k: rules[h](h, q, k)


def draw_batch(
    draw_one: Callable[[int, tuple[int, ...] | None], Tensor],
    *,
    batch: int,
    tokens: int,
    heads: int,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    global_mask: Tensor | None = None,
    reads_padding: bool = False,
) -> Tensor:
    """Lay a pattern over each document of each row of a padded batch.

    Args:
        draw_one: length and global positions (None: the pattern's own) to a mask ``[H, length, length]``.
        batch: rows.
        tokens: columns.
        heads: heads.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        document_ids: int ``[B, S]``.
        global_mask: bool ``[B, S]``.
        reads_padding: lay the pattern over the padded length.

    Returns:
        bool ``[B, H, S, S]``; padding reads nothing and nobody reads it.
    """
    mask = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        real = [key_padding_mask is None or bool(key_padding_mask[b, s]) for s in range(tokens)]
        names = [0 if document_ids is None else int(document_ids[b, s]) for s in range(tokens)]
        for name in sorted({name for name in names if name >= 0}):
            own = [s for s in range(tokens) if names[s] == name]
            held = [s for s in own if real[s]]
            if not held:
                continue
            first, last = (own[0], own[-1]) if reads_padding else (held[0], held[-1])
            positions = None
            if global_mask is not None:
                positions = tuple(s - first for s in range(first, last + 1) if global_mask[b, s])
            drawn = draw_one(last - first + 1, positions)
            at = torch.tensor(held)
            mask[b, :, at[:, None], at] = drawn[:, (at - first)[:, None], at - first]
    return mask
