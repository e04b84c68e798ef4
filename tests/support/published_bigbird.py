"""The published random blocks of BigBird, from the code inside Transformers (in training mode: in evaluation it has none)."""

import functools

import numpy
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

# The in-tree code leaves out 2048, where google's own uses the plan drawn for 4096 tokens as well.
EARLY_LENGTHS = (1024, 2048, 3072, 4096)
Table = tuple[tuple[frozenset[int], ...], ...]


@functools.lru_cache(maxsize=64)
def published_blocks(n: int, block: int, count: int, *, heads: int, layer: int) -> Table:
    """Return the random blocks of each head and each block of queries; the first and the last block have none.

    Args:
        n: tokens, a multiple of ``block``.
        block: tokens of a block.
        count: random blocks for each block of queries.
        heads: heads of the layer.
        layer: index of the layer, the seed of the published draw.
    """
    attention = BigBirdBlockSparseAttention(
        BigBirdConfig(hidden_size=heads, num_attention_heads=heads, block_size=block, num_random_blocks=count),
        seed=layer,
    ).train()
    before = numpy.random.get_state()
    try:
        numpy.random.seed(layer)
        if n in EARLY_LENGTHS:
            drawn = [
                attention._bigbird_block_rand_mask(4096, 4096, block, block, count, last_idx=1024)[: n // block - 2]
                for _ in range(heads)
            ]
        else:
            lengths, counts = attention._get_rand_attn_plan(n, block, count)
            drawn = attention._bigbird_block_rand_mask_with_head(n, n, block, block, heads, lengths, counts)
    finally:
        numpy.random.set_state(before)
    none: frozenset[int] = frozenset()
    return tuple((none, *(frozenset(int(j) for j in row) for row in head), none) for head in drawn)
