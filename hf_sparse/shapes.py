"""Checks of the tensors that reach the attention function."""

import torch
from torch import Tensor


def check_attention_inputs(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that query, key and value fit together.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``; ``H`` is a multiple of ``G``.
        value: float ``[B, G, S, Dv]``.

    Raises:
        ValueError: if a size does not fit; the message names the tensors and their shapes.
        TypeError: if the tensors are not of one floating dtype.
    """
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not (query.dim() == key.dim() == value.dim() == 4):
        raise ValueError(f"query, key and value must be [batch, heads, tokens, width]; got {shapes}")
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        raise TypeError(
            f"query, key and value must share one floating dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        raise ValueError(f"batch, key heads, key tokens or width do not agree: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the number of query heads must be a multiple of the number of key heads: {shapes}")


def check_token_mask(mask: Tensor, name: str, *, batch: int, tokens: int, is_boolean: bool = True) -> None:
    """Check a per-token tensor ``[B, S]``.

    Args:
        mask: the tensor to check.
        name: what the error calls it.
        batch: rows it must have.
        tokens: columns it must have.
        is_boolean: whether it must be bool (True) or an integer tensor (False).

    Raises:
        ValueError: if the shape is another.
        TypeError: if the dtype is another.
    """
    if tuple(mask.shape) != (batch, tokens):
        raise ValueError(f"{name} must have shape [batch, tokens] = [{batch}, {tokens}], got {list(mask.shape)}")
    if is_boolean and mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = real or global), got {mask.dtype}; pass `{name} != 0`")
    if not is_boolean and (mask.is_floating_point() or mask.dtype == torch.bool):
        raise TypeError(f"{name} must be an integer tensor, got {mask.dtype}")
