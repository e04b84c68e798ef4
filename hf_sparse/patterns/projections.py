"""Projections of their own for a few rows: those of global tokens, and those of relay nodes."""

from typing import ClassVar

from torch import Tensor, nn


class GlobalProjections(nn.Module):
    """Projections for the rows of global tokens: their queries, and the keys and values of all tokens.

    Attributes:
        zeros: the modules that start as zeros; all others start as copies of the layer's own.
    """

    zeros: ClassVar[tuple[str, ...]] = ()

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(hidden_size, num_heads * head_dim)
        self.key = nn.Linear(hidden_size, num_key_value_heads * head_dim)
        self.value = nn.Linear(hidden_size, num_key_value_heads * head_dim)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project.

        Args:
            hidden_states: float ``[B, S, hidden_size]``, what the attention layer was given.

        Returns:
            query ``[B, H, S, D]``, key and value ``[B, G, S, D]``.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return query, key, value

    def finish(self, rows: Tensor) -> Tensor:
        """Return what the rows hand to the layer's output projection, float ``[B, H, T, D]``, given what they read."""
        return rows


class RelayProjections(GlobalProjections):
    """Projections for the rows of relay nodes, an output projection among them.

    What a relay has read, ``x``, becomes ``x + output(x)`` before the layer's own output projection: the two together are an
    output projection of the relay's own, which starts as the layer's since ``output`` starts as zeros.
    """

    zeros: ClassVar[tuple[str, ...]] = ("output",)

    def __init__(self, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int) -> None:
        super().__init__(hidden_size, num_heads, num_key_value_heads, head_dim)
        self.output = nn.Linear(num_heads * head_dim, num_heads * head_dim)

    def finish(self, rows: Tensor) -> Tensor:
        merged = rows.transpose(1, 2).flatten(2)
        # the weight may be quantized
        added = self.output(merged.to(self.output.bias.dtype)).to(rows.dtype)
        return rows + added.unflatten(2, (rows.shape[1], -1)).transpose(1, 2)
