"""The predictor of SAC's edges: an LSTM that goes from a source to one destination after the other."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_sparse.patterns.plain_linear import PlainLinear

# the first distance, in nodes, of each bucket behind that of 0: single ones up to 8, then half a power of two each
FIRST_DISTANCES = (*range(1, 9), *(math.ceil(8 * 2 ** (step / 2)) for step in range(1, 8)))
BUCKETS = 2 * (len(FIRST_DISTANCES) + 1)


@dataclass(frozen=True, eq=False)
class Nodes:
    """What the predictor sees of the nodes of some rows.

    Attributes:
        asked: float ``[B, n, hidden_size]``, what each node asks with as a source, and is to itself as a destination.
        offered: float ``[B, n, hidden_size]``, what each node is to others; the same object where the two do not differ.
    """

    asked: Tensor
    offered: Tensor


@dataclass(frozen=True, eq=False)
class Record:
    """Edges that were picked in a call, on some rows and heads.

    Attributes:
        rows: of the batch.
        batch: how many rows that has.
        heads: of the layer.
        nodes: what the predictor saw; without a gradient.
        picks: int64 ``[B, H, n, steps]``, destinations of each source as they were picked; -1 from where there are none.
        is_causal: whether destinations ahead of the source were left out.
    """

    rows: slice
    batch: int
    heads: slice
    nodes: Nodes
    picks: Tensor
    is_causal: bool


class EdgePredictor(nn.Module):
    """Picks the destinations of every source node, head by head, each pick given those before it.

    The LSTM starts in a learned state of the head and reads the source. A candidate's score is the scaled product of the
    node's vector with a projection of the LSTM's output, and a bias of the head for the bucket of the distance; who was picked
    cannot be picked again. The LSTM then reads the node just picked, with an encoding of its distance from the source.

    Attributes:
        is_recording: whether picks of training are kept in ``records``; ``recipes.policy`` sets it and takes them off.
        is_imitating: whether the layer attends to everything and records what it attends to most; for ``imitate_``.
        records: what was recorded and not taken off yet.

    Args:
        hidden_size: width of the hidden states.
        heads: query heads of the layer.
        size: width of the predictor.

    Source: Li et al. 2020, arXiv:2003.09833, section 3; the buckets are T5's (Raffel et al. 2020, arXiv:1910.10683), in nodes.
    """

    def __init__(self, hidden_size: int, heads: int, size: int) -> None:
        super().__init__()
        self.enter = PlainLinear(hidden_size, size)
        # output and cell
        self.start = nn.Parameter(torch.empty(2, heads, size))
        self.lstm = nn.LSTMCell(size, size)
        self.pointer = PlainLinear(size, size)
        self.distance_bias = nn.Parameter(torch.empty(heads, BUCKETS))
        self.distance_code = nn.Parameter(torch.empty(BUCKETS, size))
        self.is_recording = self.is_imitating = False
        self.records: list[Record] = []
        self.reset()

    def reset(self) -> None:
        """Start at random, with no regard to distance, the same in every process."""
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                generator = torch.Generator().manual_seed(seed)
                drawn = torch.randn(parameter.shape, generator=generator, device="cpu", dtype=torch.float32)
                parameter.copy_(drawn / math.sqrt(parameter.shape[-1]))
            # heads differ from the start
            self.start.mul_(math.sqrt(self.start.shape[-1]))
            for held in (self.enter.bias, self.pointer.bias, self.lstm.bias_ih, self.lstm.bias_hh):
                held.zero_()
            self.distance_bias.zero_()
            self.distance_code.zero_()

    def pick(self, nodes: Nodes, steps: int, *, heads: slice, is_causal: bool, is_sampled: bool) -> Tensor:
        """Pick the destinations of every source.

        Args:
            nodes: of B rows.
            steps: destinations of a source, at most as many as there are nodes.
            heads: of the layer, those that pick.
            is_causal: whether destinations ahead of the source are left out.
            is_sampled: whether picks are drawn, with torch's global generator on the CPU; if not, the largest score is taken.

        Returns:
            int64 ``[B, H, n, steps]``, in the order of picking; -1 from where a source has no candidates left.
        """
        walk = _Walk(self, nodes, heads, is_causal)
        picks: list[Tensor] = []
        for _ in range(steps):
            if picks:
                walk.take(picks[-1])
            scores = walk.scores()
            if is_sampled:
                # the largest of scores with Gumbel noise is a draw from their softmax
                scores = scores - torch.empty(scores.shape, dtype=scores.dtype).exponential_().log().to(scores.device)
            best = scores.max(-1)
            picks.append(best.indices.masked_fill(best.values == float("-inf"), -1))
        return torch.stack(picks, -1)

    def log_probabilities(
        self,
        nodes: Nodes,
        picks: Tensor,
        is_causal: bool,
        heads: slice = slice(None),
    ) -> Tensor:
        """Return how likely each source's picks are in their order, differentiably in the weights.

        Args:
            nodes: of B rows.
            picks: int64 ``[B, H, n, steps]``, as ``pick`` returns them.
            is_causal: whether destinations ahead of the source are left out.
            heads: of the layer, those that picked.

        Returns:
            float ``[B, H, n]``, in the dtype of the nodes: the sum of the logarithms over the picks.
        """
        with torch.autocast(picks.device.type, enabled=False):
            walk = _Walk(self, nodes, heads, is_causal)
            # 0, yet a function of the weights where nothing was left to pick
            total = 0.0 * walk.output.sum(-1)
            for step, picked in enumerate(picks.unbind(-1)):
                if step:
                    walk.take(picks[..., step - 1])
                is_none = picked < 0
                scores = walk.scores().masked_fill(is_none[..., None], 0.0)
                logs = scores.log_softmax(-1).gather(-1, picked.clamp(min=0)[..., None])[..., 0]
                total = total + logs.masked_fill(is_none, 0.0)
            return total


class _Walk:
    """All sources of some rows on their way from pick to pick."""

    def __init__(self, predictor: EdgePredictor, nodes: Nodes, heads: slice, is_causal: bool) -> None:
        dtype, device = nodes.offered.dtype, nodes.offered.device
        self._weights = {name: parameter.to(dtype) for name, parameter in predictor.named_parameters()}
        entering = self._weights["enter.weight"], self._weights["enter.bias"]
        self._offered = linear(nodes.offered, *entering)
        self._is_one = nodes.asked is nodes.offered
        self._asked = self._offered if self._is_one else linear(nodes.asked, *entering)
        start = self._weights["start"][:, heads]
        batch, count = self._offered.shape[:2]
        self._place = torch.arange(count, device=device)
        self._bucket = buckets_of(self._place[None, :] - self._place[:, None])
        bias = self._weights["distance_bias"][heads][:, self._bucket]
        if is_causal:
            bias = bias.masked_fill(self._place[None, :] > self._place[:, None], float("-inf"))
        # of candidates; -inf for what cannot be picked
        self._bias = bias.expand(batch, -1, -1, -1)
        self.output, self._cell = (held[None, :, None].expand(batch, -1, count, -1) for held in start)
        self._read(self._asked[:, None].expand_as(self.output))

    def scores(self) -> Tensor:
        """Return the scores of each source's candidates, ``[B, H, n, n]``; -inf for what cannot be picked."""
        pointer = linear(self.output, self._weights["pointer.weight"], self._weights["pointer.bias"])
        pointer = pointer / math.sqrt(pointer.shape[-1])
        offered = self._offered[:, None].expand_as(pointer).transpose(-1, -2)
        # in one pass: of many nodes each costs as much as the products
        scores = torch.baddbmm(self._bias.flatten(0, 1), pointer.flatten(0, 1), offered.flatten(0, 1))
        scores = scores.view_as(self._bias)
        if not self._is_one:
            own = (pointer * self._asked[:, None]).sum(-1) + self._bias.diagonal(dim1=-2, dim2=-1)
            scores = scores.diagonal_scatter(own, dim1=-2, dim2=-1)
        return scores

    def take(self, picked: Tensor) -> None:
        """Go to a destination of each source, int64 ``[B, H, n]``; from -1 on, nothing counts."""
        at = picked.clamp(min=0)
        self._bias = self._bias.scatter(-1, at[..., None], float("-inf"))
        index = at[..., None].expand_as(self.output)
        vectors = self._offered[:, None].expand_as(self.output).gather(2, index)
        if not self._is_one:
            vectors = torch.where((at == self._place)[..., None], self._asked[:, None], vectors)
        self._read(vectors + self._weights["distance_code"][self._bucket[self._place, at]])

    def _read(self, vectors: Tensor) -> None:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        state = self.output.flatten(0, 2), self._cell.flatten(0, 2)
        held = torch.lstm_cell(vectors.flatten(0, 2), state, *(self._weights[f"lstm.{name}"] for name in names))
        self.output, self._cell = (new.view(vectors.shape) for new in held)


def buckets_of(distances: Tensor) -> Tensor:
    """Return the buckets of distances in nodes, int64, below ``BUCKETS``: the second half is ahead of the source."""
    first = torch.tensor(FIRST_DISTANCES, device=distances.device)
    return torch.bucketize(distances.abs(), first, right=True) + (distances > 0) * (BUCKETS // 2)
