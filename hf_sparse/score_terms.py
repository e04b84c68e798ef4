"""What makes scores more than the scaled product of query and key: biases, a cap, and sinks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.patterns import Pattern


@dataclass(frozen=True)
class ScoreTerms:
    """Terms of the scores; None where a call has none.

    Attributes:
        bias: float, broadcastable to ``[B, H, T, S]``, added to the scores.
        distance_bias: float ``[H, 2 * M + 1]``, added by how far the key stands from the query.
        softcap: caps the scores by ``softcap * tanh(scores / softcap)``, before anything is added.
        sinks: float ``[H]``, a score of each head that takes its share of the softmax and gives nothing.
    """

    bias: Tensor | None = None
    distance_bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of those that are given."""
        return tuple(name for name, value in vars(self).items() if value is not None)

    @property
    def is_plain(self) -> bool:
        """Whether scores are products alone; sinks come in afterwards."""
        return self.bias is None and self.distance_bias is None and self.softcap is None

    def check(self, query: Tensor, keys: int, pattern: Pattern) -> None:
        """Check them against a call.

        Args:
            query: ``[B, H, T, D]``.
            keys: how many there are, S.
            pattern: who reads whom.

        Raises:
            ValueError: if one has a wrong shape or value, or the pattern does not serve it.
        """
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be above 0, got {self.softcap}; leave it out where there is none")
        self._check_shapes(query, keys)
        bias = self.distance_bias
        if bias is not None and (bias.dim() != 2 or bias.shape[0] != query.shape[1] or bias.shape[1] % 2 == 0):
            raise ValueError(
                f"distance_bias must have shape [heads, 2 * M + 1] with {query.shape[1]} heads, got {list(bias.shape)}"
            )
        refused = [name for name in self.names if name != "sinks"] if pattern.pools_nodes else []
        if bias is not None and (pattern.has_nodes or pattern.num_labels):
            refused = ["distance_bias"]
        if refused:
            kind = "nodes that are no tokens" if pattern.has_nodes else "learned labels of distances"
            raise ValueError(f"pattern {pattern.key!r} has {kind} and does not serve {', '.join(refused)}")

    def _check_shapes(self, query: Tensor, keys: int) -> None:
        whole = (*query.shape[:3], keys)
        if self.bias is not None:
            shape = tuple(self.bias.shape)
            if len(shape) > 4 or any(size not in (1, own) for size, own in zip(shape[::-1], whole[::-1], strict=False)):
                raise ValueError(
                    f"bias must be broadcastable to [batch, heads, queries, keys] = {list(whole)}, got {list(shape)}"
                )
        if self.sinks is not None and tuple(self.sinks.shape) != (query.shape[1],):
            raise ValueError(f"sinks must have shape [heads] = [{query.shape[1]}], got {list(self.sinks.shape)}")

    def drawn_bias(
        self, query: Tensor, key: Tensor, query_positions: Tensor | None, key_positions: Tensor | None
    ) -> Tensor | None:
        """Return all that is added to the scores as one bias, broadcastable to ``[B, H, T, S]``.

        Args:
            query: ``[B, H, T, D]``.
            key: ``[B, G, S, D]``.
            query_positions: int64 ``[B, T]``, where queries stand; None where they are the keys.
            key_positions: int64 ``[B, S]``, where keys stand; given with ``query_positions``.
        """
        if self.distance_bias is None:
            return self.bias
        if query_positions is None or key_positions is None:
            query_positions = key_positions = torch.arange(key.shape[2], device=query.device)[None]
        most = self.distance_bias.shape[1] // 2
        lag = key_positions[:, None, :] - query_positions[:, :, None]
        drawn = self.distance_bias[:, lag.clamp(-most, most) + most].transpose(0, 1)
        return drawn if self.bias is None else drawn + self.bias

    def with_sinks(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Return an output ``[B, H, T, D]`` and a logsumexp ``[B, H, T]`` with the share of the sinks taken off."""
        if self.sinks is None:
            return out, lse
        total = torch.logaddexp(lse, self.sinks.to(lse.dtype)[None, :, None])
        # a query that reads nothing has an output of 0 and stays as it is
        is_empty = lse == float("-inf")
        share = (lse - total).masked_fill(is_empty, 0.0).exp()
        return (out * share[..., None]).to(out.dtype), total.masked_fill(is_empty, float("-inf"))
