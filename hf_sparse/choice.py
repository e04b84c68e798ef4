"""Which backend runs a call: what was asked for, if it can serve, else what is fastest for the shape and the device."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse.backends.flex_tags import serves
from hf_sparse.backends.plans import cached_plan
from hf_sparse.cutter import covers_all
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern, parts_of
from hf_sparse.plan import MOST_WHOLE
from hf_sparse.tiles import Mask, MaskByHead, Tile

BACKENDS = ("auto", "dense", "gather", "flex", "varlen")
logger = logging.getLogger("hf_sparse")


@dataclass(frozen=True)
class Choice:
    """What runs a call.

    Attributes:
        backend: "gather", "dense", or "sdpa": torch's dense attention, under the pattern's mask unless it allows every pair.
        reason: why, in a few words.
        mask: the pattern's, for "sdpa".
    """

    backend: str
    reason: str
    mask: Mask | None = None

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason}"


def explain(
    pattern: Pattern,
    n: int,
    *,
    heads: int = 1,
    layer: int = 0,
    is_causal: bool = False,
    dropout: float = 0.0,
    device: str = "cpu",
) -> Choice:
    """Say what ``backend="auto"`` runs for a sequence without padding, marks or projections of a pattern's own.

    What a call chose is logged at the debug level of the logger "hf_sparse".

    Args:
        pattern: who reads whom.
        n: tokens, at least 1.
        heads: query heads, at least 1.
        layer: index of the layer, at least 0.
        is_causal: whether keys ahead of the query are left out.
        dropout: probability of dropping an attention probability.
        device: where the tensors are, "cpu" or "cuda"; on the former of float32 or float64 without autocast, and as many key
            heads as query heads; on the latter of float32 or less, in heads of a width of 16 or more.

    Returns:
        The backend and the reason; printed, it is one line.

    Raises:
        ValueError: if ``n`` or ``heads`` is below 1.
    """
    if n < 1 or heads < 1:
        raise ValueError(f"n and heads must be at least 1, got n={n}, heads={heads}")
    if pattern.is_content_based:
        return Choice("gather", "blocks of tokens that are found by content, put back and merged")
    scope = Scope(n, heads, layer if pattern.varies_by_layer else 0, is_causal, nodes=pattern.num_nodes(n))
    choice = choose_backend(
        "auto", pattern, scope, device, can_flex=True, can_mask=True, is_plain=True, dropout=dropout
    )
    if choice.backend != "gather":
        return choice
    plan = cached_plan(pattern, scope, None, (), "all", True)
    scores, _, calls = plan.count_work()
    if plan.is_whole:
        return Choice("gather", _under_mask(n))
    return Choice("gather", f"{calls} calls over blocks that compute {scores / (heads * n * n):.2%} of all pairs")


def choose_backend(
    asked: str,
    pattern: Pattern,
    scope: Scope,
    device: str,
    *,
    can_flex: bool,
    can_mask: bool = False,
    terms: tuple[str, ...] = (),
    is_plain: bool,
    dropout: float,
) -> Choice:
    """Choose what runs a call.

    Args:
        asked: one of ``BACKENDS``.
        pattern: who reads whom.
        scope: of a sequence as long as the keys.
        device: type of the device the tensors are on.
        can_flex: whether dtype and widths suit the kernel of "flex".
        can_mask: whether shapes and dtype suit torch's fused kernel under a mask.
        terms: names of the terms of the scores that are given; see ``ScoreTerms``.
        is_plain: whether there is nothing but query, key and value of one length: no masks, positions or weights of the
            pattern, and no logsumexp wanted.
        dropout: probability of dropping an attention probability.

    Raises:
        ValueError: if the backend is unknown or cannot serve the call.
    """
    if asked not in BACKENDS:
        raise ValueError(f"unknown backend {asked!r}; known: {', '.join(BACKENDS)}")
    only_dense = tuple(name for name in terms if name == "bias")
    if asked == "gather" and only_dense:
        raise ValueError(f"backend {asked!r} does not serve {', '.join(only_dense)}; pass backend='dense'")
    if asked in ("flex", "varlen") and terms:
        raise ValueError(f"backend {asked!r} does not serve {', '.join(terms)}; pass backend='auto'")
    if asked != "auto":
        return Choice(asked, "it was asked for")
    choice = Choice("gather", "blocks of queries beside blocks of keys")
    # dense attention with dropout is slow on a CPU
    can_be_whole = is_plain and not terms and not (dropout and device == "cpu") and not pattern.has_nodes
    if only_dense:
        choice = Choice("dense", f"only it serves {', '.join(only_dense)}")
    elif torch.compiler.is_compiling():
        # a compiled call serves every length with one graph, so nothing may depend on the length here
        return choice
    elif can_be_whole and _allows_every_pair(pattern, scope):
        choice = Choice("sdpa", _every_pair(scope.length))
    elif can_be_whole and can_mask and (tile := _whole_tile(pattern, scope)) is not None:
        said = _every_pair(scope.length) if tile.mask is None else _under_mask(scope.length)
        choice = Choice("sdpa", said, tile.mask)
    elif (
        device == "cuda"
        and can_flex
        and not terms
        and importlib.util.find_spec("triton")
        and serves(pattern, parts_of(pattern, scope))
    ):
        choice = Choice("flex", "one fused kernel over the blocks that are read")
    logger.debug("%s of %d tokens: %s", pattern.key, scope.length, choice)
    return choice


def _every_pair(n: int) -> str:
    return f"the pattern allows every pair of {n} tokens"


def _under_mask(n: int) -> str:
    return f"one call over {n} x {n} pairs under the pattern's mask, faster than blocks at this length"


def cuda_backend(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a backend that is imported when it is first wanted: "flex" or "varlen"."""
    if name == "flex":
        from hf_sparse.backends.flex import flex_sparse_attention

        return flex_sparse_attention
    from hf_sparse.backends.varlen import varlen_window_attention

    return varlen_window_attention


def _whole_tile(pattern: Pattern, scope: Scope) -> Tile | None:
    """Return the tile of all heads that torch's own attention runs faster on a CPU than blocks; None where it does not."""
    if scope.length > MOST_WHOLE:
        return None
    plan = cached_plan(pattern, scope, None, (), "all", True)
    if not plan.is_whole:
        return None
    tiles = [work for group in plan.groups for work in group.work if isinstance(work, Tile)]
    if all(tile.mask is None for tile in tiles):
        return tiles[0]
    # heads that differ have a mask each: together too large to be kept in the dtype that torch wants
    mask = tiles[0].mask
    serves = len(tiles) == 1 and mask is not None and not isinstance(mask, MaskByHead) and mask.empty_rows is None
    return tiles[0] if serves else None


@functools.lru_cache(maxsize=256)
def _allows_every_pair(pattern: Pattern, scope: Scope) -> bool:
    """Say whether parts that allow every pair by themselves serve all heads."""
    full = [part.heads for part in parts_of(pattern, scope) if covers_all(part, scope)]
    served = frozenset().union(*(range(scope.heads) if heads is None else heads for heads in full))
    return len(served) == scope.heads
