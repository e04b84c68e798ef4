"""Reformer: tokens that hash alike, found by sorting."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_sparse.patterns.content import Content, ContentPattern
from hf_sparse.patterns.parent import Pattern, check_choice, check_count, check_seed, check_switch
from hf_sparse.slots import Assignment, Rounds, cut, of_rounds, ragged

# buckets beyond which they are told apart by two smaller hashes
_MOST_BUCKETS = 128
# the length that shorter vectors are divided by
_LEAST = 1e-12


@dataclass(frozen=True)
class Reformer(ContentPattern):
    """Every token reads tokens that hash like it, in each of several rounds.

    With ``shared_query_key`` it is the paper's: queries are their own keys, of unit length, and the scale is 1. A round sorts
    the tokens by bucket and cuts them into chunks; a token reads its chunk and the one before, and itself only if there is
    nothing else to read.

    Without, it serves queries and keys of a dense checkpoint: both are mapped to vectors of one length, so that near means a
    large product, projected on a random direction, sorted apart, and cut into as many clusters; queries read the keys of
    theirs. Causal queries may then find nothing behind them: unite it with a band.

    Causal: values never come from ahead, but what is ahead takes part in the sorting, so it has a say in who is read. With
    ``prefix_stable`` it has none.

    Args:
        num_hashes: rounds, at least 1.
        num_buckets: buckets of a round, even, at least 2; None for twice as many as there are chunks. Of the paper's form.
        chunk_length: tokens of a chunk, at least 1.
        shared_query_key: the paper's form, which a model has to be trained in; converted checkpoints were not.
        seed: of the hashes; at least 0. They depend on it, the layer and the head alone.
        counting: "set" counts a pair once; "multiset" as often as it stands together, as the public implementations do.
        look_back_across_rounds: whether the first chunk of a round reads the last one of the round before, as in the public
            implementations; needs "multiset".
        prefix_stable: no chunks: a token reads all of its bucket, and ``num_buckets`` has to be given. The cost grows with
            the square of the largest bucket.

    Source: Kitaev et al. 2020, arXiv:2001.04451, section 2; without shared keys Daras et al. 2020, arXiv:2010.05315, section
    3.2. Every pair counts once where the public implementations count it once a round.
    """

    key: ClassVar[str] = "reformer"
    num_hashes: int = 4
    num_buckets: int | None = None
    chunk_length: int = 64
    shared_query_key: bool = False
    seed: int = 0
    counting: str = "set"
    look_back_across_rounds: bool = False
    prefix_stable: bool = False

    def check_fields(self) -> None:
        check_count(self.num_hashes, "num_hashes", least=1)
        check_count(self.chunk_length, "chunk_length", least=1)
        check_seed(self.seed)
        for name in ("shared_query_key", "look_back_across_rounds", "prefix_stable"):
            check_switch(getattr(self, name), name)
        check_choice(self.counting, "counting", ("set", "multiset"))
        if self.num_buckets is not None:
            check_count(self.num_buckets, "num_buckets", least=2)
            if self.num_buckets % 2:
                raise ValueError(f"num_buckets must be even, got {self.num_buckets}")
        if self.look_back_across_rounds and (self.counting != "multiset" or not self.shared_query_key):
            raise ValueError("look_back_across_rounds needs counting='multiset' and shared_query_key=true")
        if self.prefix_stable and self.num_buckets is None:
            raise ValueError("prefix_stable needs num_buckets: a number that does not depend on the length")

    @property
    def varies_by_layer(self) -> bool:
        return True

    @property
    def self_is_last_resort(self) -> bool:
        return self.shared_query_key

    def prepare(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
        if not self.shared_query_key:
            return query, key, scale
        return query, _UnitVectors.apply(query), 1.0

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        tokens = query.shape[2]
        if self.prefix_stable:
            return self._by_bucket(query, key, content)
        if self.shared_query_key:
            return self._chunks(self.buckets(query, content))
        clusters = max(1, -(-tokens // self.chunk_length))
        directions = content.draw((self.num_hashes, query.shape[3] + 2), self.seed, query)
        order = [torch.argsort(said, dim=-1, stable=True).flatten(0, 1) for said in asymmetric(query, key, directions)]
        blocks = [cut(held, self.chunk_length) for held in order]
        repeats = None
        if self.num_hashes > 1 and clusters > 1 and self.counting == "set":
            repeats = Rounds(_chunk_of(order[0], self.chunk_length), _chunk_of(order[1], self.chunk_length))
        if clusters == 1:
            # one cluster holds all, in every round
            blocks = [held[:, :1] if self.counting == "set" else held for held in blocks]
        return Assignment(of_rounds(blocks[0], blocks[1]), repeats)

    def buckets(self, vectors: Tensor, content: Content) -> Tensor:
        """Hash vectors.

        Args:
            vectors: float ``[B, H, N, D]``.
            content: of the call.

        Returns:
            int64 ``[B * H, num_hashes, N]``.
        """
        tokens = vectors.shape[2]
        wanted = self.num_buckets or max(2, 2 * -(-tokens // self.chunk_length))
        sizes = [wanted] if wanted <= _MOST_BUCKETS else _factors(wanted)
        drawn = content.draw((self.num_hashes, sum(sizes) // 2, vectors.shape[3]), self.seed, vectors)
        turned = torch.einsum("bhnd,hrcd->bhrnc", vectors, drawn)
        found = torch.zeros(1, dtype=torch.int64, device=vectors.device)
        for part in turned.split([size // 2 for size in sizes], -1):
            # the largest of these and of their negatives, which come behind them
            at = part.abs().argmax(-1, keepdim=True)
            own = at + (part.gather(-1, at) < 0) * part.shape[-1]
            found = found * (2 * part.shape[-1]) + own[..., 0]
        return found.flatten(0, 1)

    def _chunks(self, buckets: Tensor) -> Assignment:
        """Return chunks of tokens sorted by bucket, each beside the one before."""
        tokens = buckets.shape[2]
        order = torch.argsort(buckets, dim=-1, stable=True)
        own = cut(order, self.chunk_length)
        before = torch.nn.functional.pad(own[:, :, :-1], (0, 0, 1, 0), value=-1)
        if self.look_back_across_rounds:
            before = own.flatten(1, 2).roll(1, 1).view_as(own)
        is_alone = tokens <= self.chunk_length and not self.look_back_across_rounds
        keys = own if is_alone else torch.cat([before, own], -1)
        if is_alone and self.counting == "set":
            own, keys = own[:, :1], keys[:, :1]
        repeats = None
        if self.num_hashes > 1 and self.counting == "set" and not is_alone:
            chunk = _chunk_of(order, self.chunk_length)
            repeats = Rounds(chunk, chunk, reach=1)
        reach = None if self.look_back_across_rounds else 0 if is_alone else 1
        slots = of_rounds(own, keys, reach)
        return Assignment(slots, repeats, reads_self=False)

    def _by_bucket(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        """Let every token read all of its bucket, so that who reads whom depends on the two alone."""
        q, k = (self.buckets(torch.nn.functional.normalize(x, dim=-1), content) for x in (query, key))
        slots = tuple(
            dataclasses.replace(found, rank=torch.full_like(found.lane, i))
            for i in range(self.num_hashes)
            for found in ragged(q[:, i], k[:, i], self.chunk_length)
        )
        repeats = Rounds(q.int(), k.int()) if self.num_hashes > 1 and self.counting == "set" else None
        return Assignment(slots, repeats, reads_self=not self.shared_query_key)

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        read: float = self.chunk_length * (2 if self.shared_query_key else 1)
        if self.prefix_stable:
            read = n / (self.num_buckets or 1)
        pairs = min(self.num_hashes * read, n) / n
        return pairs / 2 if is_causal else pairs

    def wide_open(self, length: int) -> Pattern:
        if self.shared_query_key:
            raise ValueError(
                f"pattern {self.key!r} with shared_query_key reads queries as keys, which no dense model does"
            )
        return Reformer(num_hashes=1, chunk_length=length, seed=self.seed)


class _UnitVectors(torch.autograd.Function):
    """Vectors divided by their lengths, as ``torch.nn.functional.normalize`` does, head by head.

    What lies between is small then and stays near the core: over all heads at once it costs more than attending.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        unit, lengths = torch.empty_like(vectors), vectors.new_empty(*vectors.shape[:-1], 1)
        for held, own, length in zip(_by_head(vectors), _by_head(unit), _by_head(lengths), strict=True):
            torch.linalg.vector_norm(held, dim=-1, keepdim=True, out=length)
            torch.div(held, length.clamp_(min=_LEAST), out=own)
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        unit, lengths = ctx.saved_tensors
        found = torch.empty_like(unit)
        for grad, own, length, result in zip(*(_by_head(t) for t in (grads[0], unit, lengths, found)), strict=True):
            along = (grad * own).sum(-1, keepdim=True).masked_fill_(length <= _LEAST, 0.0)
            torch.sub(grad, along * own, out=result).div_(length)
        return found


def _by_head(tensor: Tensor) -> list[Tensor]:
    return [head for row in tensor for head in row]


def asymmetric(query: Tensor, key: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Project queries and keys, mapped to vectors of one length with products that are those of queries and keys.

    Each gets two coordinates more: one that brings it to that length, which the other has not. The vectors themselves, as
    large as queries and keys, are not made.

    Args:
        query: float ``[B, H, N, D]``.
        key: float ``[B, H, N, D]``.
        directions: float ``[H, R, D + 2]``.

    Returns:
        Projections of queries and keys, each ``[B, H, R, N]``.

    Source: Daras et al. 2020, arXiv:2010.05315, section 3.2.
    """
    width = query.shape[3]
    squares = [torch.linalg.vector_norm(x, dim=-1).square_() for x in (query, key)]
    total = squares[0].amax(2, keepdim=True) + squares[1].amax(2, keepdim=True)
    found = [
        torch.einsum("bhnd,hrd->bhrn", x, directions[..., :width])
        + (total - square).clamp_(min=0).sqrt_()[:, :, None] * directions[..., width + own, None]
        for x, square, own in ((query, squares[0], 1), (key, squares[1], 0))
    ]
    return found[0], found[1]


def _chunk_of(order: Tensor, size: int) -> Tensor:
    """Return the chunk of each token, int32 ``[..., N]``, given the places in sorted order."""
    chunk = torch.arange(order.shape[-1], device=order.device, dtype=torch.int32) // size
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, chunk.expand_as(order))


def _factors(buckets: int) -> list[int]:
    """Return two even numbers near the root, whose product is at least ``buckets``."""
    first = 2 * math.ceil(math.sqrt(buckets) / 2)
    return [first, 2 * math.ceil(buckets / first / 2)]
