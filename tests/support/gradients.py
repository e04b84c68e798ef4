"""Outputs and gradients of an attention function under fixed random weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attend = Callable[..., Tensor | tuple[Tensor, Tensor]]


def with_gradients(attend: Attend, tensors: Sequence[Tensor], *, weights: Tensor | None = None) -> list[Tensor]:
    """Run a function forward and backward.

    Args:
        attend: gets the tensors; returns an output, or an output and a logsumexp.
        tensors: what to differentiate by; they are copied first, keeping their strides.
        weights: the gradient that reaches the output; drawn if None, the same for the same shape.

    Returns:
        The output, the logsumexp if there is one, and the gradient of each tensor.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    returned = attend(*leaves)
    results = [returned] if isinstance(returned, Tensor) else list(returned)
    generator = torch.Generator().manual_seed(17)
    # where no query reads anything an oracle leaves no trace of its inputs
    loss = sum((0.0 * leaf.sum().double() for leaf in leaves), torch.zeros((), dtype=torch.float64))
    for result in results:
        drawn = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        # a logsumexp of -inf has no gradient
        is_finite = result.isfinite()
        loss = loss + (result[is_finite] * (drawn if weights is None else weights)[is_finite]).sum()
    gradients = torch.autograd.grad(loss, leaves)
    return [*(result.detach() for result in results), *gradients]
