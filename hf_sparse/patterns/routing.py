"""Routing Transformer: tokens of the same cluster read one another; the clusters follow the tokens."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_sparse.patterns.content import Content, ContentPattern
from hf_sparse.patterns.parent import Pattern, check_choice, check_count, check_seed
from hf_sparse.slots import Assignment, Memberships, Slots, largest, ragged


@dataclass(frozen=True)
class Routing(ContentPattern):
    """Queries and keys are sorted into clusters by direction; a query reads the keys of its clusters.

    Causal: values never come from ahead; but with "balanced" clusters what is ahead takes places in a cluster, so it has a say
    in who is read. With "nearest" it has none: a token's cluster depends on itself alone, and a prefix gives what it gives
    alone.

    Args:
        num_clusters: of each head, at least 1; the square root of the length is the paper's.
        window: queries, and keys, of a balanced cluster, at least 1; None for the length over ``num_clusters``. "nearest"
            clusters are as large as they are.
        decay: how much of the old centroids each training step keeps, from 0 to below 1.
        assignment: "balanced" fills each cluster with the tokens that are nearest to it, so that a token may be in several and
            in none; "nearest" puts each token into its nearest cluster.
        merge: "lse" gives all keys of a query one softmax, each counting once. "mean" averages the clusters, each with a
            softmax of its own, as the paper does.
        seed: of the centroids before they have seen a token; at least 0.

    Source: Roy et al. 2021, arXiv:2003.05997, section 4; "nearest" is the formula of Lin et al. 2021, arXiv:2106.04554, section
    4.1.2. Scores keep the model's scale, and only the choice of clusters looks at normalised vectors: a converted model goes on
    with the scores it was trained with. Keys are not shared with queries; causality goes by position, not by rank in the
    cluster. A query of no cluster reads nothing: unite the pattern with a band.
    """

    key: ClassVar[str] = "routing"
    num_clusters: int = 16
    window: int | None = None
    decay: float = 0.999
    assignment: str = "balanced"
    merge: str = "lse"
    seed: int = 0

    def check_fields(self) -> None:
        check_count(self.num_clusters, "num_clusters", least=1)
        if self.window is not None:
            check_count(self.window, "window", least=1)
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float):
            raise TypeError(f"decay must be a number, got {self.decay!r}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay}")
        check_choice(self.assignment, "assignment", ("balanced", "nearest"))
        check_choice(self.merge, "merge", ("lse", "mean"))
        check_seed(self.seed)

    @property
    def has_lse(self) -> bool:
        return self.merge == "lse"

    @property
    def varies_by_layer(self) -> bool:
        return True

    def make_state(
        self, *, hidden_size: int, num_heads: int, num_key_value_heads: int, head_dim: int
    ) -> nn.Module | None:
        return Centroids(num_heads, self.num_clusters, head_dim, decay=self.decay, seed=self.seed)

    def extend(self, query: Tensor, key: Tensor, value: Tensor, content: Content) -> tuple[Tensor, Tensor]:
        state = content.state
        if isinstance(state, Centroids) and (content.is_training or state.is_calibrating):
            if content.is_first and not state.is_calibrating:
                state.move()
            state.follow(query, key, content.scope.head_offset)
        return key, value

    def finish(self, state: nn.Module | None, *, is_training: bool) -> None:
        if isinstance(state, Centroids) and (is_training or state.is_calibrating):
            state.settle()

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        state = content.state
        if state is None:
            drawn = Centroids(
                content.scope.heads + content.scope.head_offset, self.num_clusters, query.shape[3], seed=self.seed
            )
            state = drawn.to(device=query.device, dtype=query.dtype)
        if not isinstance(state, Centroids):
            raise TypeError(f"pattern {self.key!r} needs the state that make_state makes, got {type(state).__name__}")
        first, tokens, clusters = content.scope.head_offset, query.shape[2], state.weight.shape[1]
        if self.assignment == "nearest":
            q, k = (state.scores(x, first).argmax(2).flatten(0, 1) for x in (query, key))
            return Assignment(ragged(q, k, 64))
        size = min(tokens, self.window or math.ceil(tokens / clusters))
        # head by head: scores of all heads at once would be most of what a call holds
        q_at, k_at = (
            torch.cat([largest(state.scores(x[:, h : h + 1], first + h), size) for h in range(x.shape[1])], 1).flatten(
                0, 1
            )
            for x in (query, key)
        )
        lanes = len(q_at)
        lane = torch.arange(lanes, device=query.device).repeat_interleave(clusters)
        rank = torch.arange(clusters, device=query.device).repeat(lanes)
        slots = Slots(lane, q_at.flatten(0, 1), k_at.flatten(0, 1), rank)
        if self.merge == "mean":
            return Assignment((slots,), is_mean=True)
        return Assignment((slots,), None if clusters == 1 else Memberships(q_at, k_at, tokens))

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        size = min(n, self.window or math.ceil(n / self.num_clusters))
        pairs = 1 / self.num_clusters if self.assignment == "nearest" else min(1.0, self.num_clusters * (size / n) ** 2)
        return pairs / 2 if is_causal else pairs

    def wide_open(self, length: int) -> Pattern:
        return Routing(num_clusters=1, window=length, decay=self.decay, seed=self.seed)


class Centroids(nn.Module):
    """Directions that clusters gather around, for each head; they follow queries and keys as a moving average.

    A step's queries and keys are added up as they pass and move the centroids when the next training pass begins, once a
    gradient has come back: a pass that is computed again for its gradient finds the centroids it had. (Of two passes before one
    backward pass that holds for checkpoints that are not reentrant.) In a distributed run the sums of all ranks are added at
    the end of each pass, so all ranks have the same centroids, and any of them may be saved. Only directions count: a centroid
    that nothing comes near to stays where it is, and none grows by its size, which is what counts are smoothed for elsewhere.
    Train in float32, or under autocast: in half precision averages that move so slowly stand still.

    Attributes:
        weight: float ``[H, C, D]``, unit vectors.
        sums: float ``[H, C, D]``, moving average of the sum of what was nearest to each.
        new_sums: float ``[H, C, D]``, what has passed since.

    Args:
        heads: query heads of the layer.
        clusters: of each head.
        head_dim: width of a head.
        decay: how much of the averages each step keeps.
        seed: of the directions at the start, drawn at random.

    Source: Roy et al. 2021, arXiv:2003.05997, section 4.1.
    """

    weight: Tensor
    sums: Tensor
    new_sums: Tensor

    def __init__(self, heads: int, clusters: int, head_dim: int, *, decay: float = 0.999, seed: int = 0) -> None:
        super().__init__()
        self.decay, self.seed = decay, seed
        for name in ("weight", "sums", "new_sums"):
            self.register_buffer(name, torch.empty(heads, clusters, head_dim))
        # whether what passes is noted outside of training too, and moves nothing by itself
        self.is_calibrating = False
        # a checkpoint may hold what its last step noted
        self._may_move = True
        # of the pass under way, and of this rank alone; None where nothing has passed
        self._noted: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Draw the directions anew."""
        heads, clusters, width = self.weight.shape
        drawn = torch.stack(
            [
                torch.randn(
                    clusters,
                    width,
                    generator=torch.Generator().manual_seed(self.seed + head),
                    device="cpu",
                    dtype=torch.float32,
                )
                for head in range(heads)
            ]
        )
        self.weight.copy_(normalize(drawn, dim=-1))
        self.sums.copy_(self.weight)
        self.new_sums.zero_()

    def scores(self, vectors: Tensor, head_offset: int = 0) -> Tensor:
        """Return how near vectors ``[B, H, N, D]`` are to each centroid, ``[B, H, C, N]``: the cosine."""
        held = self.weight[head_offset : head_offset + vectors.shape[1]].to(vectors.dtype)
        return torch.einsum("hcd,bhnd->bhcn", held, normalize(vectors, dim=-1))

    def follow(self, query: Tensor, key: Tensor, head_offset: int = 0) -> None:
        """Take note of queries ``[B, H, N, D]`` and keys ``[B, G, N, D]`` of a training pass; ``settle`` then counts them."""
        # a pass that is computed again for its gradient was noted the first time
        if torch._C._current_graph_task_id() != -1:
            return
        if key.requires_grad:
            key.register_hook(self._allow_move)
        else:
            self._may_move = True
        ratio = query.shape[1] // key.shape[1]
        at = slice(head_offset, head_offset + query.shape[1])
        with torch.no_grad():
            if self._noted is None:
                self._noted = torch.zeros_like(self.sums)
            for vectors in (query.detach(), key.detach().repeat_interleave(ratio, 1)):
                nearest = nn.functional.one_hot(self.scores(vectors, head_offset).argmax(2), self.weight.shape[1])
                nearest = nearest.to(self.sums.dtype)
                self._noted[at] += torch.einsum(
                    "bhnc,bhnd->hcd", nearest, normalize(vectors, dim=-1).to(self.sums.dtype)
                )

    def settle(self) -> None:
        """Count what was noted in a pass, on all ranks of a distributed run; each calls it once a pass."""
        if torch._C._current_graph_task_id() != -1:
            return
        noted, self._noted = self._noted, None
        if noted is None:
            noted = torch.zeros_like(self.sums)
        # a pass that overflowed has no directions, and what is not finite would stay in the averages for ever
        noted = noted.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(noted)
        with torch.no_grad():
            self.new_sums += noted

    def move(self) -> None:
        """Let the centroids follow what was noted since they last did, if that may be used by now."""
        if not self._may_move or torch._C._current_graph_task_id() != -1:
            return
        self._may_move = False
        if not self.new_sums.any():
            return
        with torch.no_grad():
            self.sums.mul_(self.decay).add_(self.new_sums, alpha=1 - self.decay)
            # where nothing has come for long hardly anything is left of the average, and no direction in it
            is_held = self.sums.norm(dim=-1, keepdim=True) > 1e-6
            self.weight.copy_(torch.where(is_held, normalize(self.sums, dim=-1), self.weight))
            self.new_sums.zero_()

    def adopt(self, passes: int) -> None:
        """Go to the mean direction of what was noted in so many passes; a centroid that nothing came near to stays."""
        with torch.no_grad():
            is_held = self.new_sums.norm(dim=-1, keepdim=True) > 1e-6
            self.weight.copy_(torch.where(is_held, normalize(self.new_sums, dim=-1), self.weight))
            # as the moving average of the passes would be
            self.sums.copy_(torch.where(is_held, self.new_sums / passes, self.weight))
            self.new_sums.zero_()

    def _allow_move(self, _grad: Tensor) -> None:
        self._may_move = True
