"""Keys that a pattern counts more than once: what it adds to their scores, as one more column of queries and keys."""

import torch
from torch import Tensor

from hf_sparse.patterns import Pattern


def with_counted_keys(
    query: Tensor, key: Tensor, pattern: Pattern, *, scale: float, refused: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """Return queries and keys whose scores have what a pattern adds to them.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, T, D]``.
        pattern: whose ``added_scores`` is not None.
        scale: factor of the scores.
        refused: what such a pattern does not serve, and whether the call asks for it.

    Returns:
        query ``[B, H, T, D + 1]`` and key ``[B, G, T, D + 1]``; in float32 where half precision is given, which would round the
        logarithms.

    Raises:
        ValueError: if the call asks for what is refused.
    """
    named = {**refused, "a scale of 0": not scale}
    for what, is_given in named.items():
        if is_given:
            raise ValueError(f"pattern {pattern.key!r} counts some keys more than once and does not serve {what}")
    added = pattern.added_scores(key.shape[2])
    assert added is not None
    held = []
    for tensor, column in zip((query, key), (added[0], added[1] / scale), strict=True):
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        held.append(torch.cat([tensor, column.to(tensor).expand(*tensor.shape[:3])[..., None]], 3))
    return held[0], held[1]
