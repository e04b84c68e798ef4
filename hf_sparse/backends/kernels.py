"""The attention of one tile, forward and backward: torch's fused CPU kernel where it can serve, plain products elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_sparse.backends.dropout import keep_, kept_bits
from hf_sparse.tiles import Mask

Result = TypeVar("Result")

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def without_autocast(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function, of which the first argument is a tensor, that runs in the precision it chooses itself."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Result:
        device = first.device.type
        # tensors without data know no autocast
        if device == "meta":
            return function(first, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(first, *args, **kwargs)

    return run


@dataclass(frozen=True)
class Kernel:
    """Attention of single tiles.

    Attributes:
        scale: factor of the scores.
        dropout: probability of dropping an attention probability, from 0 up to but not including 1.
        is_fused: whether torch's fused kernel runs them, which holds no scores.
    """

    scale: float
    dropout: float
    is_fused: bool

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, words: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: float ``[X, H, T, D]``.
            key: float ``[X, H, S, D]``.
            value: float ``[X, H, S, Dv]``.
            mask: bool, broadcastable to ``[X, H, T, S]`` once a head axis is put before the last two.
            words: of the dropout, for queries ``[X, H, T]`` and keys, broadcastable to ``[X, H, S]``; None without it.

        Returns:
            Output ``[X, H, T, Dv]``, 0 for a query that reads nothing, and logsumexp ``[X, H, T]``, -inf there.
        """
        empty = None if mask is None else mask.empty_rows(query.device)
        if self.is_fused:
            bias = None if mask is None else _spread(mask.additive(query), 2)
            out, lse = _fused_forward(query, key, value, 0.0, False, attn_mask=bias, scale=self.scale)
            # the fused kernel reports 0 for a row without keys
            return out, lse if empty is None else lse.masked_fill(_spread(empty, 1), float("-inf"))
        probabilities, lse = self._probabilities(query, key, mask, empty)
        if words is None:
            return probabilities @ value, lse
        keep_(probabilities, kept_bits(*words, self.dropout, probabilities.dtype))
        return (probabilities @ value).mul_(1 / (1 - self.dropout)), lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
        words: tuple[Tensor, Tensor] | None,
        out: Tensor,
        lse: Tensor,
        grad_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value of one tile.

        Args:
            grad_out: gradient of the whole output at these queries, ``[X, H, T, Dv]``.
            query: as in ``forward``.
            key: as in ``forward``.
            value: as in ``forward``.
            mask: as in ``forward``.
            words: as in ``forward``.
            out: the output merged over all tiles.
            lse: the logsumexp merged over all tiles; for a query that gets no gradient a huge number.
            grad_lse: gradient of the merged logsumexp ``[X, H, T]``, or None; the fused kernel takes none.
        """
        if self.is_fused:
            bias = None if mask is None else _spread(mask.additive(query), 2)
            return _fused_backward(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=self.scale)
        empty = None if mask is None else mask.empty_rows(query.device)
        probabilities, own_lse = self._probabilities(query, key, mask, empty)
        probabilities.mul_((own_lse - lse).exp_()[..., None])
        delta = (grad_out * out).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse
        if words is None:
            grad_value = probabilities.transpose(-1, -2) @ grad_out
            grad_scores = grad_out @ value.transpose(-1, -2)
        else:
            bits = kept_bits(*words, self.dropout, probabilities.dtype)
            scaled = grad_out * (1 / (1 - self.dropout))
            grad_value = keep_(probabilities.clone(), bits).transpose(-1, -2) @ scaled
            grad_scores = keep_(scaled @ value.transpose(-1, -2), bits)
        grad_scores.sub_(delta[..., None]).mul_(probabilities)
        grad_query, grad_key = grad_scores @ key, grad_scores.transpose(-1, -2) @ query
        return grad_query.mul_(self.scale), grad_key.mul_(self.scale), grad_value

    def _probabilities(
        self, query: Tensor, key: Tensor, mask: Mask | None, empty: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the softmax of the scores ``[X, H, T, S]``, 0 in empty rows, and their logsumexp."""
        scores = (query * self.scale) @ key.transpose(-1, -2)
        if mask is not None:
            scores += _spread(mask.additive(scores), 2)
        top = scores.amax(-1)
        probabilities = torch.softmax(scores, -1)
        # the largest probability is 1 / sum(exp(score - top)): two passes fewer than logsumexp takes
        lse = top - probabilities.amax(-1).log_()
        if empty is not None:
            spread = _spread(empty, 1)
            probabilities.masked_fill_(spread[..., None], 0.0)
            lse.masked_fill_(spread, float("-inf"))
        return probabilities, lse


def _spread(mask: Tensor, last: int) -> Tensor:
    """Return a mask with the axes of blocks and heads before its last ones: shared, of blocks, or of blocks and heads."""
    if mask.dim() == last:
        return mask[None, None]
    return mask if mask.dim() == last + 2 else mask[:, None]
