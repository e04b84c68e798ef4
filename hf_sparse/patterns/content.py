"""What every content-based pattern is: it looks at queries and keys, and says who reads whom."""

import hashlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_sparse.parts import Part, Scope
from hf_sparse.patterns.parent import Pattern
from hf_sparse.slots import Assignment


@dataclass(frozen=True, eq=False)
class Content:
    """What a content-based pattern may look at beside queries and keys, of some rows that hold one sequence each.

    Attributes:
        scope: of the sequence; ``length`` counts real tokens.
        state: the module that ``make_state`` made, or None.
        hidden_states: float ``[B, N, hidden_size]``, what the attention layer was given, where there is a state.
        is_first: whether these are the first sequences of a call.
        is_training: whether noise that is for training is added.
        scale: factor of the scores.
        rows: which of the batch these are.
        batch: rows of the batch.
        takes_shares: whether the backend gives "shares" of ``held`` their gradient.
        held: what a pattern keeps from ``extend`` for ``choose``; and "shares", for ``slot_attention``.
    """

    scope: Scope
    state: nn.Module | None = None
    hidden_states: Tensor | None = None
    is_first: bool = True
    is_training: bool = False
    scale: float = 1.0
    rows: slice = field(default_factory=lambda: slice(None))
    batch: int = 1
    takes_shares: bool = False
    held: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
        """Draw standard normal numbers ``[heads, *shape]`` that depend on seed, layer and head alone.

        Never from the global generator: the same in training and evaluation, and when activations are recomputed.
        """
        first = self.scope.head_offset
        drawn = [
            torch.randn(
                shape,
                generator=torch.Generator().manual_seed(_mixed(seed, self.scope.layer, head)),
                device="cpu",
                dtype=torch.float32,
            )
            for head in range(first, first + self.scope.heads)
        ]
        return torch.stack(drawn).to(device=like.device, dtype=like.dtype)


def _mixed(*numbers: int) -> int:
    """Return a seed that depends on several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


@dataclass(frozen=True)
class ContentPattern(Pattern):
    """A pattern whose edges depend on queries and keys. Its edges have no gradient; all else has."""

    is_content_based: ClassVar[bool] = True

    def prepare(self, query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
        """Return the queries, keys and scale that are attended with, token by token and differentiably.

        Args:
            query: float ``[B, H, N, D]``.
            key: float ``[B, G, N, D]``.
            scale: factor of the scores that the caller gave.
        """
        return query, key, scale

    def extend(self, query: Tensor, key: Tensor, value: Tensor, content: Content) -> tuple[Tensor, Tensor]:
        """Return keys and values, behind those of tokens what is no token, differentiably; called before ``choose``.

        Args:
            query: float ``[B, H, N, D]``.
            key: float ``[B, G, N, D]``.
            value: float ``[B, G, N, Dv]``.
            content: what else there is to look at.
        """
        return key, value

    def choose(self, query: Tensor, key: Tensor, content: Content) -> Assignment:
        """Say who reads whom; run without gradients.

        Args:
            query: float32 or float64 ``[B, H, N, D]``.
            key: ``[B, H, N, D]``; heads that share keys have each their own copy.
            content: what else there is to look at.
        """
        raise NotImplementedError

    def finish(self, state: nn.Module | None, *, is_training: bool) -> None:
        """Do what is done once in a call, after all its sequences.

        Args:
            state: the module that ``make_state`` made, or None.
            is_training: whether this is training.
        """

    @property
    def always(self) -> Pattern | None:
        """What is read as well whatever the content, a pair counting once; None where nothing is."""
        return None

    @property
    def self_is_last_resort(self) -> bool:
        """Whether a query that reads nothing else reads itself."""
        return False

    def parts(self, scope: Scope) -> tuple[Part, ...]:
        raise ValueError(
            f"pattern {self.key!r} is content-based: who reads whom depends on queries and keys, so there is nothing to draw "
            "without them"
        )

    def density(self, n: int, *, heads: int = 1, layer: int = 0, is_causal: bool = False) -> float:
        """Return at most how many edges there are, over ``n**2``: pairs that stand in a block, counted as often as they do."""
        raise NotImplementedError


def block_sums(vectors: Tensor, size: int) -> Tensor:
    """Return the sums of blocks of ``[..., N, D]``, ``[..., blocks, D]``; the last block may be shorter."""
    blocks = -(-vectors.shape[-2] // size)
    missing = blocks * size - vectors.shape[-2]
    # a pad by nothing copies
    filled = nn.functional.pad(vectors, (0, 0, 0, missing)) if missing else vectors
    return filled.unflatten(-2, (blocks, size)).sum(-2)


def block_means(vectors: Tensor, size: int) -> Tensor:
    """Return the means of blocks of ``[..., N, D]``, ``[..., blocks, D]``; the last block may be shorter."""
    sums = block_sums(vectors, size)
    counts = torch.full((sums.shape[-2], 1), float(size), dtype=vectors.dtype, device=vectors.device)
    counts[-1] = vectors.shape[-2] - (sums.shape[-2] - 1) * size
    return sums / counts


def up_to_first(vectors: Tensor, size: int) -> Tensor:
    """Return the mean of all vectors up to the first of each block, that one included, ``[..., blocks, D]``."""
    steps = torch.arange(1, vectors.shape[-2] + 1, device=vectors.device, dtype=vectors.dtype)
    return (vectors.cumsum(-2) / steps[:, None])[..., ::size, :]
