"""Learned scores by the kind of a pair: a relative position, or how a token stands to a node."""

import torch
from torch import Tensor, nn


class RelativeLabels(nn.Module):
    """A key vector and a bias for each label, added to the key and to the score of every pair that has the label.

    All start as 0, so that a converted model says what it said.

    Attributes:
        keys: float ``[V, H, D]``, or ``[V, 1, D]`` where heads share them.
        bias: float ``[V, H]`` or ``[V, 1]``; None without one.

    Args:
        labels: how many there are.
        heads: query heads of the layer; 1 lets them share.
        head_dim: width of a head.
        has_bias: whether there is a bias beside the key vectors.

    Source: Shaw et al. 2018, arXiv:1803.02155, and Ainslie et al. 2020, arXiv:2004.08483, section 3.1.
    """

    def __init__(self, labels: int, heads: int, head_dim: int, *, has_bias: bool = True) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(labels, heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(labels, heads)) if has_bias else None

    def reset(self) -> None:
        """Set all to 0."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    def forward(self, query: Tensor, *, scale: float, head_offset: int = 0) -> Tensor:
        """Return what each label adds to the scores of each query.

        Args:
            query: float ``[B, H, T, D]``.
            scale: factor of the scores.
            head_offset: index of the first head held here.

        Returns:
            float ``[B, H, T, V]``.
        """
        held = slice(head_offset, head_offset + query.shape[1]) if self.keys.shape[1] > 1 else slice(None)
        scores = query @ self.keys[:, held].permute(1, 2, 0).to(query.dtype)
        if self.bias is not None:
            scores = scores + self.bias[:, held].t()[:, None].to(query.dtype)
        return scores * scale
