"""Dropout of attention probabilities as a function of the seed and of the pair alone.

What is dropped does not depend on how the work is cut into tiles, nor on their order, nor on the backend: forward,
backward and every backend drop the same pairs without keeping a mask.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# two rounds of multiplication and one of shifting mix the sum of two random words; the constants are odd, for a bijection
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


@dataclass(frozen=True)
class Words:
    """Random words of queries and keys; the mixed sum of two decides about a pair.

    Attributes:
        query: int32 ``[B, H, T]``.
        key: int32 ``[S]``.
    """

    query: Tensor
    key: Tensor


def draw_words(seed: Tensor, batch: int, heads: int, tokens: int, keys: int, device: torch.device) -> Words:
    """Draw the words of one call.

    Args:
        seed: int64 ``[1]``.
        batch: rows.
        heads: query heads.
        tokens: queries.
        keys: keys.
        device: where the words are needed. They are drawn on the CPU, so that a seed means the same everywhere.
    """
    generator = torch.Generator().manual_seed(int(seed))
    words = torch.empty(batch * heads * tokens + keys, dtype=torch.int32)
    words.random_(-(1 << 31), 1 << 31, generator=generator)
    words = words.to(device)
    return Words(words[: batch * heads * tokens].view(batch, heads, tokens), words[batch * heads * tokens :])


def threshold(dropout: float) -> int:
    """Return the 31-bit number below which a mixed word keeps its pair; the chance is exact to within 2**-32."""
    return round((1 - dropout) * (1 << 31)) - (1 << 30)


def mix(query: Tensor, key: Tensor) -> Tensor:
    """Return int32 numbers, uniform over 31 bits with sign, for broadcast words of queries and keys."""
    mixed = query + key
    mixed = mixed * _FIRST
    mixed = mixed ^ (mixed >> 15)
    return (mixed * _SECOND) >> 1


def drop_(probabilities: Tensor, query: Tensor, key: Tensor, dropout: float) -> Tensor:
    """Set the dropped entries to 0, in place; the kept ones are not scaled.

    Args:
        probabilities: float32 or float64 ``[..., T, S]``.
        query: int32 words of the queries ``[..., T]``.
        key: int32 words of the keys ``[..., S]``.
        dropout: probability of dropping an entry, above 0 and below 1.
    """
    # integer arithmetic in place of a comparison and a selection, which torch's CPU runs ten times slower
    mixed = torch.add(query[..., :, None], key[..., None, :])
    shifted = torch.bitwise_right_shift(mixed.mul_(_FIRST), 15)
    mixed.bitwise_xor_(shifted).mul_(_SECOND)
    torch.bitwise_right_shift(mixed, 1, out=shifted)
    is_kept = shifted.sub_(threshold(dropout)).bitwise_right_shift_(31)
    bits = torch.int64 if probabilities.dtype == torch.float64 else torch.int32
    probabilities.view(bits).bitwise_and_(is_kept.to(bits))
    return probabilities
