"""Biases by relative position, as T5 has them: a value for each distance in the place of one for each pair of tokens."""

import functools
from typing import Any

from torch import Tensor, nn


def has_buckets(module: nn.Module) -> bool:
    """Say whether an attention module adds a learned bias by buckets of distances to its scores."""
    return hasattr(type(module), "_relative_position_bucket") and hasattr(type(module), "compute_bias")


def give_distances_(model: nn.Module, name: str) -> None:
    """Let modules that compute the bias of their stack give that of each distance, in O(1), under an attention name.

    What they give passes on to the other layers as the bias of every pair would, and reaches our attention function.

    Args:
        model: a transformers model; changed in place.
        name: of our attention; under other names modules do what their class does.
    """
    for module in model.modules():
        if has_buckets(module) and getattr(module, "has_relative_attention_bias", False):
            module.__dict__["compute_bias"] = functools.partial(_compute_bias, module, name)


def _compute_bias(module: Any, name: str, *args: Any, **kwargs: Any) -> Tensor:
    compute = functools.partial(type(module).compute_bias, module)
    if module.config._attn_implementation != name:
        return compute(*args, **kwargs)
    most = module.relative_attention_max_distance
    # one query, and keys from that many tokens behind it to as many ahead: all that are farther share their bucket
    return compute(1, 2 * most + 1, past_seen_tokens=most)[0, :, 0]
