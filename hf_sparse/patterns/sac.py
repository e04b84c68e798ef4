"""SAC, sparse adaptive connection: a small recurrent network picks who reads whom."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.patterns.band import Band
from hf_sparse.patterns.content import Content, ContentPattern, block_means, block_sums, up_to_first
from hf_sparse.patterns.edge_predictor import EdgePredictor, Nodes, Record
from hf_sparse.patterns.parent import Pattern, check_choice, check_count
from hf_sparse.slots import Assignment, Slots, cut

# queries of a block where everything is read
_ROWS = 64


@dataclass(frozen=True)
class SAC(ContentPattern):
    """An LSTM picks for every token, or block of tokens, the tokens or blocks that it reads, beside its neighbours.

    Picks are made head by head and differ from one another, so they are a set. In evaluation the largest score is picked, in
    training one is drawn. Hidden states get no gradient from the choice, and the predictor none from the task: it starts at
    random, learns to pick what a dense layer attends to by ``hf_sparse.imitate_``, and is trained with the model by
    ``hf_sparse.recipes.policy.PolicyLoss``.

    Causal: destinations are the source and nodes before it. A block asks, and is to itself, the mean of all tokens up to its
    first, so that a prefix gives what it gives alone.

    Cost: scores of all nodes for all nodes, at each pick. With "token" that is as many as dense attention has,
    and on the backend "flex" each token fills a block of the kernel.

    Args:
        edges_per_token: keys that a token picks, at least 1; with "block", so many rounded up to whole blocks.
        granularity: "block" picks blocks for blocks, whose vectors are means of hidden states; "token" tokens for tokens.
        block_size: tokens of a block, at least 1; for "block".
        radius: reach of the neighbours to each side that are read as well, in tokens; 0 is the token alone.
        predictor_size: width of the predictor, at least 1.

    Source: Li et al. 2020, arXiv:2003.09833, section 3. There one long chain picks the sources of edges as it picks their
    destinations; here every node is a source once and the chains of all nodes run side by side, which is the paper's variant
    with all nodes connected. Blocks, the band and the warm start by imitation are ours.
    """

    key: ClassVar[str] = "sac"
    edges_per_token: int = 128
    granularity: str = "block"
    block_size: int = 64
    radius: int = 64
    predictor_size: int = 64

    def check_fields(self) -> None:
        for name in ("edges_per_token", "block_size", "predictor_size"):
            check_count(getattr(self, name), name, least=1)
        check_choice(self.granularity, "granularity", ("block", "token"))
        check_count(self.radius, "radius", least=0)

    @property
    def always(self) -> Pattern:
        return Band(radius=self.radius)

    @property
    def varies_by_layer(self) -> bool:
        return True

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        return EdgePredictor(hidden_size, num_heads, self.predictor_size)

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        state, scope = content.state, content.scope
        if not isinstance(state, EdgePredictor) or content.hidden_states is None:
            raise ValueError("pattern 'sac' needs the state that make_state makes, and hidden_states")
        tokens = query.shape[2]
        places = cut(torch.arange(tokens, device=query.device), self._size)
        steps = min(self._picks, len(places))
        heads = slice(scope.head_offset, scope.head_offset + scope.heads)
        nodes = self._nodes(content.hidden_states.to(query.dtype), scope.is_causal)
        if state.is_imitating and steps < len(places):
            picks = self._strongest(query, key, content, steps)
            state.records.append(Record(content.rows, content.batch, heads, nodes, picks, scope.is_causal))
        if state.is_imitating or steps == len(places):
            picks = places.new_zeros(*query.shape[:2], len(places), 0)
            read = self._everything(query)
        else:
            picks = state.pick(nodes, steps, heads=heads, is_causal=scope.is_causal, is_sampled=content.is_training)
            read = self._read(places, picks)
        # what is computed again for its gradient was recorded the first time
        if state.is_recording and content.is_training and torch._C._current_graph_task_id() == -1:
            state.records.append(Record(content.rows, content.batch, heads, nodes, picks, scope.is_causal))
        return read

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        blocks = -(-n // self._size)
        steps = min(self._picks, blocks)
        # the first sources have fewer candidates
        picked = steps * blocks - (steps * (steps - 1) // 2 if is_causal else 0)
        beside = self.always.density(n, is_causal=is_causal)
        most = (n + 1) / (2 * n) if is_causal else 1.0
        return min(most, beside + picked * self._size**2 / n**2)

    def wide_open(self, length: int) -> Pattern:
        return dataclasses.replace(self, edges_per_token=length)

    @property
    def _size(self) -> int:
        """Tokens of a node."""
        return self.block_size if self.granularity == "block" else 1

    @property
    def _picks(self) -> int:
        """Destinations of a source."""
        return -(-self.edges_per_token // self._size)

    def _nodes(self, hidden_states: Tensor, is_causal: bool) -> Nodes:
        """Return the nodes of hidden states ``[B, N, hidden_size]``."""
        hidden_states = hidden_states.detach()
        if self.granularity == "token":
            return Nodes(hidden_states, hidden_states)
        means = block_means(hidden_states, self._size)
        return Nodes(up_to_first(hidden_states, self._size) if is_causal else means, means)

    def _read(self, places: Tensor, picks: Tensor) -> Assignment:
        """Let the tokens of each source read those of its destinations."""
        lanes, nodes = picks.shape[0] * picks.shape[1], len(places)
        # of none the last line
        held = torch.cat([places, torch.full_like(places[:1], -1)])
        keys = held[picks].view(lanes * nodes, -1)
        lane = torch.arange(lanes, device=picks.device).repeat_interleave(nodes)
        return Assignment((Slots(lane, places.repeat(lanes, 1), keys),))

    def _everything(self, query: Tensor) -> Assignment:
        lanes, whole = query.shape[0] * query.shape[1], torch.arange(query.shape[2], device=query.device)
        queries = cut(whole, _ROWS)
        lane = torch.arange(lanes, device=query.device).repeat_interleave(len(queries))
        return Assignment((Slots(lane, queries.repeat(lanes, 1), whole.expand(len(lane), -1)),))

    def _strongest(self, query: Tensor, key: Tensor, content: Content, steps: int) -> Tensor:
        """Return the destinations that dense attention gives most to outside of the band, as ``EdgePredictor.pick`` does.

        What gets nothing is no destination.
        """
        tokens, found = query.shape[2], []
        place = torch.arange(tokens, device=query.device)
        for queries in place.split(-(-_ROWS // self._size) * self._size):
            lag = queries[:, None] - place
            scores = query[:, :, queries] @ key.transpose(-1, -2) * content.scale
            if content.scope.is_causal:
                scores = scores.masked_fill(lag < 0, float("-inf"))
            mass = scores.softmax(-1).masked_fill(lag.abs() <= self.radius, 0.0)
            by_destination = block_sums(mass.transpose(-1, -2), self._size)
            found.append(block_sums(by_destination.transpose(-1, -2), self._size))
        best = torch.cat(found, 2).topk(steps, -1)
        return best.indices.masked_fill(best.values == 0, -1)
