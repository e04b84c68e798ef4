"""Dropout of attention probabilities as a function of the seed and of the pair alone.

What is dropped does not depend on how the work is cut into tiles, nor on their order, nor on the backend: forward,
backward and every backend drop the same pairs without keeping a mask.
"""

import torch
from torch import Tensor

# two rounds of multiplication and one of shifting mix the sum of two random words; the constants are odd, for a bijection
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@torch.library.custom_op("hf_sparse::draw_words", mutates_args=())
def draw_words(
    seed: Tensor, batch: int, heads: int, tokens: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw the random words of one call; the mixed sum of a query's and a key's decides about the pair.

    Args:
        seed: int64 ``[1]``.
        batch: rows.
        heads: query heads.
        tokens: queries.
        keys: keys.
        device: where the words are needed. They are drawn on the CPU, so that a seed means the same everywhere.

    Returns:
        int32 words of the queries ``[batch, heads, tokens]`` and of the keys ``[keys]``.
    """
    generator = torch.Generator().manual_seed(int(seed))
    shapes = (batch, heads, tokens), (keys,)
    query, key = (
        torch.empty(shape, dtype=torch.int32, device="cpu").random_(-(1 << 31), 1 << 31, generator=generator)
        for shape in shapes
    )
    return query.to(device), key.to(device)


@draw_words.register_fake
def _(seed, batch, heads, tokens, keys, device):  # type: ignore[no-untyped-def]
    return (
        torch.empty(batch, heads, tokens, dtype=torch.int32, device=device),
        torch.empty(keys, dtype=torch.int32, device=device),
    )


def threshold(dropout: float) -> int:
    """Return the 31-bit number below which a mixed word keeps its pair; the chance is exact to within 2**-32."""
    return round((1 - dropout) * (1 << 31)) - (1 << 30)


def mix(query: Tensor, key: Tensor) -> Tensor:
    """Return int32 numbers, uniform over 31 bits with sign, for broadcast words of queries and keys."""
    mixed = query + key
    mixed = mixed * _FIRST
    mixed = mixed ^ (mixed >> 15)
    return (mixed * _SECOND) >> 1


def kept_bits(query: Tensor, key: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """Return what was kept as integers of the width of a float dtype: all bits set, or none.

    Integer arithmetic throughout: torch's CPU kernels run a comparison and a selection ten times slower.

    Args:
        query: int32 words of the queries ``[..., T]``.
        key: int32 words of the keys ``[..., S]``.
        dropout: probability of dropping an entry, above 0 and below 1.
        dtype: float32 or float64.
    """
    mixed = torch.add(query[..., :, None], key[..., None, :]).mul_(_FIRST)
    shifted = torch.bitwise_right_shift(mixed, 15)
    mixed.bitwise_xor_(shifted).mul_(_SECOND)
    torch.bitwise_right_shift(mixed, 1, out=shifted)
    # the sign, spread over all bits
    return shifted.sub_(threshold(dropout)).bitwise_right_shift_(31).to(_BITS[dtype])


def keep_(entries: Tensor, bits: Tensor) -> Tensor:
    """Set the dropped entries of ``[..., T, S]`` to 0, in place; the kept ones are not scaled."""
    entries.view(bits.dtype).bitwise_and_(bits)
    return entries
