"""Attention of the layers that stay dense: cross-attention, and those that were declared so."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.attention import sparse_attention
from hf_sparse.integration.layers import EVERYTHING
from hf_sparse.integration.mask import SparseMask
from hf_sparse.patterns import Band


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: SparseMask,
    window: int | None,
    dropout: float,
    scaling: float | None,
    terms: dict[str, Any],
    *,
    is_cross: bool,
    band: Band = EVERYTHING,
) -> Tensor:
    """Attend as the dense layer does: cross-attention, and layers declared dense.

    What torch's own attention has no argument for runs along a band: a sliding window of the model's own, a cap, sinks, and a
    bias by distance. In a compiled graph no pattern can be made, so ``band`` is one that is at hand.
    """
    bias = terms.pop("bias")
    radius = EVERYTHING.radius if window is None else window - 1
    if not is_cross and (window is not None or any(term is not None for term in terms.values())):
        query_positions, key_positions = mask.positions(key.shape[0], from_first=True)
        attended: Any = sparse_attention(
            query,
            key,
            value,
            band if band.radius == radius else Band(radius=radius),
            is_causal=mask.is_causal,
            key_padding_mask=mask.padding,
            document_ids=mask.document_ids,
            query_positions=query_positions,
            key_positions=key_positions,
            scale=scaling,
            dropout=dropout,
            bias=bias,
            **terms,
        )
        return attended
    allowed = None if mask.padding is None else mask.padding[:, None, None, :]
    if mask.is_causal:
        causal = _causal(mask, query.shape[2], key.shape[2], key.device)
        allowed = causal if allowed is None else allowed & causal
    if mask.document_ids is not None:
        same = mask.document_ids[:, None, :, None] == mask.document_ids[:, None, None, :]
        allowed = same if allowed is None else allowed & same
    if bias is not None:
        allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
    return nn.functional.scaled_dot_product_attention(
        query, key, value, allowed, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )


def _causal(mask: SparseMask, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return which keys causality leaves to each query, bool ``[T, S]``."""
    key_index = torch.arange(keys, device=device) if mask.key_index is None else mask.key_index
    query_index = key_index[keys - queries :] if mask.query_index is None else mask.query_index
    return query_index[:, None] >= key_index[None, :]
