"""How many of all pairs the layers of a converted checkpoint read."""

import functools

from hf_sparse.conversion.target import Layer, Target
from hf_sparse.patterns import Band, Pattern


def layer_density(pattern: Pattern | None, layer: Layer, length: int) -> float:
    """Return the share of the ``length ** 2`` pairs of tokens that a layer reads, averaged over its heads.

    Args:
        pattern: of the layer; None for a dense one, which keeps its causality and its own sliding window.
        layer: whose heads read.
        length: tokens, at least 1.
    """
    if pattern is None and not layer.is_causal:
        return 1.0
    if pattern is None:
        pattern = Band(radius=(layer.window or length) - 1)
    at = layer.index if pattern.varies_by_layer else 0
    return _density(pattern, length, layer.heads, at, layer.is_causal)


@functools.lru_cache(maxsize=4096)
def _density(pattern: Pattern, length: int, heads: int, layer: int, is_causal: bool) -> float:
    return pattern.density(length, heads=heads, layer=layer, is_causal=is_causal)


def mean_density(target: Target, length: int) -> float:
    """Return the share of pairs that are read at a length, averaged over layers and heads."""
    shares = [
        layer_density(target.entry.pattern_of(layer.stack, layer.index), layer, length) for layer in target.layers
    ]
    return sum(shares) / len(shares)
