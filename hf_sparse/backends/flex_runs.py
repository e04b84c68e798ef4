"""What FlexAttention takes, and how it runs without being compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# the narrowest heads that the kernels on CUDA take
NARROWEST = 16


def check_served(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that the kernels take these tensors.

    Raises:
        ValueError: if the device, the dtype, a width or, on the CPU, a gradient cannot be served.
    """
    device = query.device.type
    if device not in ("cuda", "cpu"):
        raise ValueError(
            f"backend 'flex' runs on cuda and, uncompiled, on the cpu, not on {device}; pass backend='gather'"
        )
    if device == "cpu":
        if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
            raise ValueError("backend 'flex' has no gradient on the cpu; pass backend='gather' or use torch.no_grad()")
    elif query.dtype == torch.float64:
        raise ValueError("backend 'flex' does not serve float64 on cuda; pass backend='gather'")
    elif min(query.shape[3], value.shape[3]) < NARROWEST:
        raise ValueError(
            f"backend 'flex' needs heads of width {NARROWEST} or more on cuda, got {query.shape[3]} and {value.shape[3]}; "
            f"pass backend='gather'"
        )


def uncompiled(attend: Callable[..., tuple[Tensor, Tensor]], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Run a function of query, key, value and more uncompiled, without gradients."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings(), torch.no_grad():
        # that it is slow uncompiled is known
        warnings.simplefilter("ignore", UserWarning)
        query, key, value = (tensor.detach() for tensor in arguments[:3])
        return attend(query, key, value, *arguments[3:])
