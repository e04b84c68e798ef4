"""How much of all pairs of tokens a model reads."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_sparse.integration.layers import is_causal, num_heads_of, numbered
from hf_sparse.integration.windows import window_of
from hf_sparse.patterns import Band, Pattern


@dataclass(frozen=True)
class Layer:
    """A self-attention layer.

    Attributes:
        stack: "encoder" or "decoder" in a model that has both, else "".
        index: of the layer in its stack.
        heads: query heads.
        is_causal: whether a query reads only what comes before.
        window: the layer's own sliding window, in tokens; None where it has none.
    """

    stack: str
    index: int
    heads: int
    is_causal: bool
    window: int | None


def layer_of(stack: str, index: int, module: nn.Module, config: Any) -> Layer:
    """Return what is to be known of a self-attention module, named as ``self_attention_modules`` does."""
    causal = is_causal(module)
    window = window_of(config, numbered(module, index), is_causal=causal)
    return Layer(stack, index, num_heads_of(module, config) or 1, causal, window)


def layer_density(pattern: Pattern | None, layer: Layer, length: int) -> float:
    """Return the share of the ``length ** 2`` pairs of tokens that a layer reads, averaged over its heads.

    Args:
        pattern: of the layer; None for a dense one, which keeps its causality and its own sliding window.
        layer: whose heads read.
        length: tokens, at least 1.
    """
    if pattern is None and layer.window is None and not layer.is_causal:
        return 1.0
    if pattern is None:
        pattern = Band(radius=(layer.window or length) - 1)
    at = layer.index if pattern.varies_by_layer else 0
    return _density(pattern, length, layer.heads, at, layer.is_causal)


@functools.lru_cache(maxsize=4096)
def _density(pattern: Pattern, length: int, heads: int, layer: int, is_causal: bool) -> float:
    return pattern.density(length, heads=heads, layer=layer, is_causal=is_causal)


def mean_density(layers: Iterable[tuple[Layer, Pattern | None]], length: int) -> float:
    """Return the share of pairs that are read, averaged over layers and heads.

    Args:
        layers: each with its pattern, or None where it stays dense.
        length: of the sequence, in tokens.
    """
    shares = [layer_density(pattern, layer, length) for layer, pattern in layers]
    return sum(shares) / len(shares)
