"""The attention of one tile, forward and backward, in plain products and in units of log 2.

On a CPU the products of blocks of 64 queries run at the speed of large ones, and ``exp2`` is three times as fast as ``exp``:
together they beat torch's fused kernel at the sizes of tiles.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_sparse.backends.dropout import keep_, kept_bits
from hf_sparse.tiles import Mask, MaskByHead

Result = TypeVar("Result")

LOG2_E = math.log2(math.e)

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


class Scratch:
    """Buffers that the tiles of one call share: memory that is asked for anew costs as much as what is done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an unfilled tensor that is good until the same name is asked for again."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size:
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(shape)


@dataclass(frozen=True)
class Kernel:
    """Attention of single tiles.

    Attributes:
        scale: factor of the scores.
        dropout: probability of dropping an attention probability, from 0 up to but not including 1.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before masks are added; 0 leaves them as they are.
        scratch: where scores are held.
    """

    scale: float
    dropout: float
    softcap: float = 0.0
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by before they reach the kernel: their scores are then in units of log 2."""
        return self.scale * LOG2_E

    @property
    def grad_factor(self) -> float:
        """What gradients of the output are multiplied by before they reach the kernel."""
        return 1 / (1 - self.dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        words: tuple[Tensor, Tensor] | None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: float ``[X, T, D]``, multiplied by ``query_factor``.
            key: float ``[X, S, D]``.
            value: float ``[X, S, Dv]``.
            mask: 0 or -inf, added to the scores: ``[T, S]`` or ``[X, T, S]``; None where every pair is an edge.
            words: of the dropout, for queries ``[X, T]`` and keys, broadcastable to ``[X, S]``; None without it.
            out: where the output is written; None takes memory that the next call takes again.

        Returns:
            Output ``[X, T, Dv]``, 0 for a query that reads nothing, and logsumexp ``[X, T]``, -inf there. Good until the
            next call.
        """
        scores = self._hold("scores", query, key)
        if self.softcap:
            self._cap(scores, query, key, mask)
        elif mask is None:
            torch.bmm(query, key.transpose(1, 2), out=scores)
        else:
            torch.baddbmm(mask, query, key.transpose(1, 2), out=scores)
        # finite, so that a row of -inf stays one
        top = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).min)
        total = scores.sub_(top).exp2_().sum(-1, keepdim=True)
        if words is not None:
            keep_(scores, kept_bits(*words, self.dropout, scores.dtype))
        if out is None:
            out = self.scratch.take("out", (*query.shape[:2], value.shape[2]), query)
        torch.bmm(scores, value, out=out)
        # the largest score counts 1, so only an empty row has less
        out.mul_(1 / (total.clamp_min(1.0) * (1 - self.dropout)))
        lse = total.log2_().add_(top).mul_(1 / LOG2_E)
        return out, lse[..., 0]

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        words: tuple[Tensor, Tensor] | None,
        delta: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return what the gradients of one tile are products of.

        Args:
            grad_out: gradient of the whole output at these queries, ``[X, T, Dv]``, multiplied by ``grad_factor``.
            query: as in ``forward``.
            key: as in ``forward``.
            value: as in ``forward``.
            mask: as in ``forward``.
            words: as in ``forward``.
            delta: ``[X, T]``, the sum of the gradient of the output times the merged output, less the gradient of the
                logsumexp.
            lse: the logsumexp merged over all tiles ``[X, T]``; for a query that gets no gradient a huge number.

        Returns:
            The gradient of the scores ``[X, T, S]``: after ``uncap_``, times the keys and ``scale`` it is that of the queries;
            transposed, times the queries as they are given here and over ``LOG2_E``, that of the keys. And the probabilities
            that were kept ``[X, T, S]``: transposed, times the gradient as it is given here, they are that of the values.
            Good until the next call.
        """
        probabilities = self._hold("scores", query, key)
        top = lse[..., None] * LOG2_E
        if self.softcap:
            self._cap(probabilities, query, key, mask).sub_(top).exp2_()
        else:
            if mask is None:
                probabilities.copy_((-top).expand_as(probabilities))
            else:
                torch.sub(mask, top, out=probabilities)
            probabilities.baddbmm_(query, key.transpose(1, 2)).exp2_()
        grad_scores = self._hold("grad_scores", query, key)
        if words is None:
            grad_scores.copy_((-delta)[..., None].expand_as(grad_scores))
            grad_scores.baddbmm_(grad_out, value.transpose(1, 2)).mul_(probabilities)
            return grad_scores, probabilities
        bits = kept_bits(*words, self.dropout, probabilities.dtype)
        torch.bmm(grad_out, value.transpose(1, 2), out=grad_scores)
        keep_(grad_scores, bits).sub_(delta[..., None]).mul_(probabilities)
        return grad_scores, keep_(probabilities, bits)

    def uncap_(self, grad_scores: Tensor) -> Tensor:
        """Turn what ``backward`` gave last, in place, from a gradient of capped scores into one of the products."""
        if self.softcap:
            grad_scores.mul_(self.scratch.take("slopes", tuple(grad_scores.shape), grad_scores))
        return grad_scores

    def _cap(self, scores: Tensor, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Write capped scores under a mask, and the slope of the cap at each of them."""
        cap = self.softcap * LOG2_E
        torch.bmm(query, key.transpose(1, 2), out=scores).div_(cap).tanh_()
        slopes = self._hold("slopes", query, key)
        torch.mul(scores, scores, out=slopes).neg_().add_(1.0)
        scores.mul_(cap)
        return scores if mask is None else scores.add_(mask)

    def _hold(self, name: str, query: Tensor, key: Tensor) -> Tensor:
        return self.scratch.take(name, (*query.shape[:2], key.shape[1]), query)


def fused_forward(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by torch's fused CPU kernel, which is the faster one for a whole short sequence.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, H, S, D]``.
        value: float ``[B, H, S, D]``.
        mask: of ``[T, S]`` or ``[1, H, T, S]``; None where every pair is an edge.
        scale: factor of the scores.

    Returns:
        Output ``[B, H, T, D]``, 0 for a query that reads nothing, and logsumexp ``[B, H, T]``, -inf there.
    """
    tensors = [_dense(t) for t in (query, key, value)]
    parts = [
        _fused_forward(*(t[:, heads] for t in tensors), 0.0, False, attn_mask=term, scale=scale)
        for heads, term in _terms(mask, query)
    ]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(held, 1) for held in zip(*parts, strict=True))
    if mask is not None and mask.empty_rows is not None:
        # the kernel reports 0 for a row without keys
        lse = lse.masked_fill(mask.empty_rows, float("-inf"))
    return out, lse


def fused_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; arguments as for ``fused_forward``, and what that returned."""
    tensors = [*(_dense(t) for t in (grad_out, query, key, value, out)), lse]
    parts = [
        _fused_backward(*(t[:, heads] for t in tensors), 0.0, False, attn_mask=term, scale=scale)
        for heads, term in _terms(mask, query)
    ]
    dq, dk, dv = parts[0] if len(parts) == 1 else (torch.cat(held, 1) for held in zip(*parts, strict=True))
    return dq, dk, dv


def _terms(mask: Mask | None, like: Tensor) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield heads and their mask as a term of the scores: all at once, or as many as there are threads at a time."""
    if mask is None:
        yield slice(None), None
    elif not isinstance(mask, MaskByHead):
        yield slice(None), mask.additive(like)[None, None]
    else:
        step = max(2, torch.get_num_threads())
        room = like.new_empty(step * mask.size)
        for first in range(0, like.shape[1], step):
            heads = slice(first, first + step)
            yield heads, mask.of_heads(heads, like, room)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
