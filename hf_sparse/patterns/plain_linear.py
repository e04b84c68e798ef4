"""Weights of a linear layer that a pattern reads by itself."""

import torch
from torch import Tensor, nn


class PlainLinear(nn.Module):
    """Weight and bias under the names of ``nn.Linear``, applied in the dtype of the input.

    It is no ``nn.Linear``, which adapters and quantizers would look for and replace.

    Args:
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[..., out_features]`` of float ``[..., in_features]``."""
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias.to(inputs.dtype))
