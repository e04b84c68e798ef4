"""The attention of one tile, forward and backward: torch's fused CPU kernel where it can serve, plain products elsewhere."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

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


@dataclass
class Kernel:
    """Attention of single tiles, under one scale and one stream of dropout.

    Attributes:
        scale: factor of the scores.
        dropout: probability of dropping an attention probability, from 0 up to but not including 1.
        generator: draws what is dropped; None without dropout. Tiles must be run in one order, forward and backward.
    """

    scale: float
    dropout: float = 0.0
    generator: torch.Generator | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: float ``[X, H, T, D]``.
            key: float ``[X, H, S, D]``.
            value: float ``[X, H, S, Dv]``.
            mask: bool, broadcastable to ``[X, H, T, S]`` once a head axis is put before the last two.

        Returns:
            Output ``[X, H, T, Dv]``, 0 for a query that reads nothing, and logsumexp ``[X, H, T]``, -inf there.
        """
        if self._is_fused(query, value):
            bias = None if mask is None else _spread(mask.additive(query.dtype))
            out, lse = _fused_forward(query, key, value, 0.0, False, attn_mask=bias, scale=self.scale)
            if bias is not None:
                # the fused kernel reports 0 for a row without keys
                lse = lse.masked_fill(bias.amax(-1) == float("-inf"), float("-inf"))
            return out, lse
        scores = self._scores(query, key, mask)
        lse = scores.logsumexp(-1)
        probabilities = scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp_()
        if self.dropout:
            probabilities *= self._kept(probabilities)
        return probabilities @ value, lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None,
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
            out: the output merged over all tiles.
            lse: the logsumexp merged over all tiles, with +inf in place of -inf.
            grad_lse: gradient of the merged logsumexp ``[X, H, T]``, or None.
        """
        if self._is_fused(query, value) and grad_lse is None:
            bias = None if mask is None else _spread(mask.additive(query.dtype))
            return _fused_backward(grad_out, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=self.scale)
        probabilities = self._scores(query, key, mask).sub_(lse[..., None]).exp_()
        grad_probabilities = grad_out @ value.transpose(-1, -2)
        delta = (grad_out * out).sum(-1)
        if grad_lse is not None:
            delta = delta - grad_lse
        if self.dropout:
            kept = self._kept(probabilities)
            grad_value = (probabilities * kept).transpose(-1, -2) @ grad_out
            grad_probabilities *= kept
        else:
            grad_value = probabilities.transpose(-1, -2) @ grad_out
        grad_scores = probabilities.mul_(grad_probabilities.sub_(delta[..., None])).mul_(self.scale)
        return grad_scores @ key, grad_scores.transpose(-1, -2) @ query, grad_value

    def _is_fused(self, query: Tensor, value: Tensor) -> bool:
        return query.device.type == "cpu" and not self.dropout and query.shape[-1] == value.shape[-1]

    def _scores(self, query: Tensor, key: Tensor, mask: Mask | None) -> Tensor:
        scores = (query * self.scale) @ key.transpose(-1, -2)
        if mask is not None:
            scores.masked_fill_(~_spread(mask.on(query.device)), float("-inf"))
        return scores

    def _kept(self, like: Tensor) -> Tensor:
        """Return what dropout multiplies probabilities with: 0, or 1 / (1 - p)."""
        # 16 random bits decide, four elements to a draw: the chance is p to within 2**-17
        draws = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
        draws.random_(-(2**63), None, generator=self.generator)
        threshold = round(self.dropout * 65536) - 32768
        is_kept = draws.view(torch.int16)[: like.numel()].view(like.shape) >= threshold
        return is_kept.to(like.dtype) / (1 - self.dropout)


def _spread(mask: Tensor) -> Tensor:
    """Return a mask of 2 or 3 dimensions as 4: ``[T, S]``, blocks ``[X, T, S]`` or heads ``[1, H, T, S]``."""
    if mask.dim() == 2:
        return mask[None, None]
    return mask if mask.dim() == 4 else mask[:, None]
