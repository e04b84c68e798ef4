"""What is added to scores by the kind of a pair: learned labels of a pattern, or a bias by distance."""

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.backends.kernels import LOG2_E
from hf_sparse.backends.lanes import Head, Sheet
from hf_sparse.tiles import Run, Work


class Labels:
    """The label scores of some rows that share a plan.

    Args:
        scores: float ``[B, H, T, V]``, what is added to the score of a query and a key of each label.
        label: int64 positions of queries and of keys, broadcastable, to the label of each pair.
        total: ``T``.
    """

    def __init__(self, scores: Tensor, label: Callable[[Tensor, Tensor], Tensor], total: int) -> None:
        self.scores, self._label = scores, label
        self._position = torch.arange(total, device=scores.device)
        # labels of work that many heads share, and that take long to find
        self._held: dict[Work, Tensor] = {}

    def term(self, lane: Head | Sheet, piece: Work, mask: Tensor | None) -> Tensor:
        """Return a piece's mask and label scores as one term of the scores, ``[X, T, S]`` in units of log 2."""
        own = lane.of_queries(piece, lane.queries(self.scores))
        names = self._names(lane, piece)
        picked = own.gather(2, names.expand(len(own), -1, -1)).mul_(LOG2_E)
        return picked if mask is None else picked.add_(mask)

    def add_gradient(self, lane: Head | Sheet, piece: Work, total: Tensor, grad_scores: Tensor) -> None:
        """Add what a piece's gradient of scores ``[X, T, S]`` gives to the gradient of the label scores."""
        names = self._names(lane, piece)
        found = grad_scores.new_zeros(*grad_scores.shape[:2], total.shape[-1])
        lane.add_rows(piece, total, found.scatter_add_(2, names.expand_as(grad_scores), grad_scores), 1.0)

    def _names(self, lane: Head | Sheet, piece: Work) -> Tensor:
        if piece not in self._held:
            q, k = lane.positions(piece, self._position, self._position)
            names = self._label(q[:, :, None], k[:, None, :])
            if isinstance(piece, Run):
                return names
            self._held[piece] = names.to(torch.int16)
        return self._held[piece].long()


class Distances:
    """A bias of each head by how far the key stands from the query; rows of a batch share it.

    Args:
        bias: float ``[H, 2 * M + 1]``, for the distances (key less query) from -M to M; what is farther counts as M away.
        queries: int64 ``[T]``, where the queries stand.
        keys: int64 ``[S]``, where the keys stand.
    """

    def __init__(self, bias: Tensor, queries: Tensor, keys: Tensor) -> None:
        self._bias, self._most = bias * LOG2_E, bias.shape[1] // 2
        self._queries, self._keys = queries, keys

    def term(self, lane: Head | Sheet, piece: Work, mask: Tensor | None) -> Tensor:
        """Return a piece's mask and bias as one term of the scores, ``[1 or X, T, S]`` in units of log 2."""
        picked = lane.of_head(self._bias, self._names(lane, piece))
        return picked if mask is None else picked + mask

    def add_gradient(self, lane: Head | Sheet, piece: Work, total: Tensor, grad_scores: Tensor) -> None:
        """Add what a piece's gradient of scores ``[X, T, S]`` gives to the gradient of the bias."""
        lane.add_to_head(total, self._names(lane, piece), grad_scores)

    def _names(self, lane: Head | Sheet, piece: Work) -> Tensor:
        """Return which entry of the bias each pair has, int64 ``[1 or X, T, S]``."""
        q, k = lane.positions(piece, self._queries, self._keys)
        return (k[:, None, :] - q[:, :, None]).clamp_(-self._most, self._most).add_(self._most)
