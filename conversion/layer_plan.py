"""A plan by layer: for each layer the pattern that keeps the most attention, within a budget of pairs."""

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from rich.table import Table

from hf_sparse.integration.density import Layer, layer_density
from hf_sparse.integration.entry import Entry, make_entry
from hf_sparse.integration.windows import check_window
from hf_sparse.patterns import (
    Band,
    BigBird,
    BlockLocal,
    ByHead,
    Dilated,
    GlobalTokens,
    Longformer,
    Pattern,
    RandomBlocks,
    SparseTransformer,
    Strided,
    Union,
)

# densities that candidates are sized for, in budgets
LEVELS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


@dataclass(frozen=True)
class Choice:
    """What a plan has for a layer.

    Attributes:
        layer: as an entry names it ("3", "encoder.3").
        pattern: None for a layer that stays dense.
        density: share of all pairs that it reads.
        kept: share of the dense layer's attention on these pairs, mean over heads, queries and texts.
    """

    layer: str
    pattern: Pattern | None
    density: float
    kept: float


@dataclass(frozen=True)
class LayerPlan:
    """A pattern for each layer, chosen on texts.

    Attributes:
        choices: of each layer, in order.
        length: tokens of the pieces of text it was chosen on: densities and shares are of this length.
        texts: how many pieces.
        budget: what the mean density over layers was to be at the most.
    """

    choices: tuple[Choice, ...]
    length: int
    texts: int
    budget: float

    @property
    def entry(self) -> Entry:
        """The plan as an entry of a config."""
        return make_entry(self.pattern, self.layers)

    @property
    def pattern(self) -> Pattern:
        """The pattern that most layers have; of equally many, the one of the first."""
        counts = Counter(choice.pattern for choice in self.choices if choice.pattern is not None)
        return counts.most_common(1)[0][0] if counts else Band()

    @property
    def layers(self) -> dict[int | str, Pattern | str]:
        """What the other layers have: a pattern, or "dense"."""
        usual = self.pattern
        return {c.layer: "dense" if c.pattern is None else c.pattern for c in self.choices if c.pattern != usual}

    @property
    def density(self) -> float:
        """The share of all pairs that is read, mean over layers."""
        return sum(choice.density for choice in self.choices) / len(self.choices)

    @property
    def kept(self) -> float:
        """The share of attention that is kept, mean over layers."""
        return sum(choice.kept for choice in self.choices) / len(self.choices)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        choices = [
            {
                "layer": choice.layer,
                "name": pattern_name(choice.pattern),
                "pattern": "dense" if choice.pattern is None else choice.pattern.to_dict(),
                "density": choice.density,
                "kept": choice.kept,
            }
            for choice in self.choices
        ]
        return {
            "budget": self.budget,
            "density": self.density,
            "kept": self.kept,
            "length": self.length,
            "texts": self.texts,
            "choices": choices,
        }

    def table(self) -> Table:
        """Return the plan as a table for ``rich`` to print."""
        title = f"plan within a density of {self.budget:g}, chosen on {self.texts} pieces of {self.length:,} tokens"
        table = Table("layer", "pattern", "density", "kept", title=title)
        for choice in self.choices:
            table.add_row(choice.layer, pattern_name(choice.pattern), f"{choice.density:.4f}", f"{choice.kept:.4f}")
        table.add_row("mean", "", f"{self.density:.4f}", f"{self.kept:.4f}", style="bold")
        return table


def systems(length: int) -> dict[str, tuple[Callable[[int], Pattern], range]]:
    """Return the position-based patterns that a plan chooses from, each made of one size.

    Left out are patterns for grids of pixels, and those with nodes, of which no share of attention can be said to be kept.

    Args:
        length: tokens of a text.

    Returns:
        Of each, by name: what makes it, and the sizes, larger ones of no lower density.
    """
    return {
        "band": (lambda radius: Band(radius=radius), range(length)),
        "longformer": (
            lambda side: Longformer(window=2 * side, global_tokens=(0,), global_projections=False),
            range(1, length),
        ),
        # of blocks of one token the first and the last are global: BERT's CLS and SEP
        "band and ends": (
            lambda radius: Band(radius=radius) | BigBird(block_size=1, num_random_blocks=0),
            range(1, length),
        ),
        "dilated": (lambda radius: Dilated(radius=radius, dilation=2), range(1, length)),
        "strided": (lambda size: Strided(stride=length - size), range(length)),
        "block_local": (lambda block: BlockLocal(block_size=block), range(1, length + 1)),
        "global": (lambda count: GlobalTokens(positions=tuple(range(count))), range(1, length)),
        "random": (
            lambda count: RandomBlocks(block_size=max(1, length // 64), num_random_blocks=count),
            range(1, 64),
        ),
        "bigbird": (lambda block: BigBird(block_size=block, random_plan="full_length"), range(1, length + 1)),
        "sparse_transformer, strided": (
            lambda stride: SparseTransformer(kind="strided", stride=stride, summary=1),
            range(max(1, math.isqrt(length // 2)), length + 1),
        ),
        "sparse_transformer, fixed": (
            lambda stride: SparseTransformer(kind="fixed", stride=stride, summary=1),
            range(max(1, math.isqrt(length)), length + 1),
        ),
    }


def sized(name: str, density: float, layer: Layer, length: int) -> Pattern | None:
    """Return the largest of a system's patterns with which a layer reads no more than a share of all pairs.

    Args:
        name: of the system, one of ``systems``.
        density: the share, at the most.
        layer: whose heads read; a pattern that differs from layer to layer is sized for the first.
        length: tokens.

    Returns:
        The pattern; None where the smallest one reads more.
    """
    return _sized(name, density, dataclasses.replace(layer, index=0), length)


@functools.lru_cache(maxsize=1024)
def _sized(name: str, density: float, layer: Layer, length: int) -> Pattern | None:
    make, sizes = systems(length)[name]
    fits, exceeds = -1, len(sizes)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if layer_density(_made(make, sizes[middle], layer), layer, length) <= density:
            fits = middle
        else:
            exceeds = middle
    return None if fits < 0 else _made(make, sizes[fits], layer)


def _made(make: Callable[[int], Pattern], size: int, layer: Layer) -> Pattern:
    """Return a pattern as a layer has it: global tokens are no business of a decoder beside an encoder."""
    return make(size).for_decoder() if layer.stack == "decoder" else make(size)


def candidates(layer: Layer, budget: float, length: int, longest: int) -> list[Pattern | None]:
    """Return what a layer may have: None, which leaves it dense, and patterns of several densities about the budget's.

    Args:
        layer: the layer.
        budget: mean density over layers, at the most.
        length: tokens of the texts to choose on.
        longest: tokens of the longest input: a causal layer's own sliding window has to hold what is read there.
    """
    # the first, so that it is taken before a pattern that reads every pair
    found: dict[Pattern | None, None] = {None: None}
    for level in LEVELS:
        for name in systems(length):
            pattern = sized(name, min(1.0, level * budget), layer, length)
            if pattern is not None and _stays_inside(pattern, layer, longest):
                found[pattern] = None
    return list(found)


def _stays_inside(pattern: Pattern, layer: Layer, longest: int) -> bool:
    """Say whether a pattern reads nothing that a layer's own sliding window leaves out."""
    try:
        scope: dict[str, Any] = {"heads": layer.heads, "layer": layer.index, "length": longest}
        check_window(pattern, layer.window, is_causal=layer.is_causal, where="", **scope)
    except ValueError:
        return False
    return True


def check_budget(density: float) -> None:
    """Check a budget.

    Raises:
        ValueError: if it is no share.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, a share of all pairs of tokens; got {density!r}")


def best_choice(gains: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Return for each layer which of its candidates to take, so that the gains add up to most within a budget.

    Exact: layer by layer, all sums are kept that no other one with more gain undercuts. Of equal gains the cheaper wins, then
    the one whose candidates stand earlier.

    Args:
        gains: of each layer's candidates.
        costs: likewise, each at least 0.
        budget: what the chosen costs may add up to.

    Raises:
        ValueError: if the cheapest candidates cost more.
    """
    total, gained = numpy.zeros(1, dtype=numpy.int64), numpy.zeros(1)
    # of each layer: which sum of the layers before, and which candidate, its sums are made of
    steps = []
    left = sum(map(min, costs))
    if left > budget:
        raise ValueError(f"the cheapest choice costs {left}, more than the budget of {budget}")
    for gain, cost in zip(gains, costs, strict=True):
        left -= min(cost)
        sums = (total[:, None] + numpy.array(cost, dtype=numpy.int64)).ravel()
        together = (gained[:, None] + numpy.array(gain)).ravel()
        order = numpy.lexsort((-together, sums))
        # what leaves too little for the layers to come leads nowhere
        order = order[sums[order] <= budget - left]
        most = numpy.maximum.accumulate(together[order])
        order = order[numpy.concatenate([[True], most[1:] > most[:-1]])]
        steps.append((order, len(cost)))
        total, gained = sums[order], together[order]
    at, chosen = len(gained) - 1, []
    for order, count in reversed(steps):
        at, candidate = divmod(int(order[at]), count)
        chosen.append(candidate)
    return chosen[::-1]


def choose(
    layers: Sequence[Layer],
    options: Sequence[Sequence[Pattern | None]],
    kept: Sequence[Sequence[float]],
    *,
    budget: float,
    length: int,
    texts: int,
) -> LayerPlan:
    """Choose a plan.

    Args:
        layers: of the model.
        options: what each layer may have.
        kept: of each option, the share of attention that it keeps.
        budget: mean density over layers, at the most.
        length: tokens of the pieces that ``kept`` was measured on.
        texts: how many pieces.

    Raises:
        ValueError: if no choice fits the budget.
    """
    # counted in pairs, so that sums are exact
    heads = math.lcm(*(layer.heads for layer in layers))
    densities = [
        [layer_density(pattern, layer, length) for pattern in held] for layer, held in zip(layers, options, strict=True)
    ]
    costs = [[round(density * length * length * heads) for density in held] for held in densities]
    most = math.floor(budget * length * length * heads * len(layers) + 1e-6)
    least = sum(map(min, costs)) / (length * length * heads * len(layers))
    if sum(map(min, costs)) > most:
        raise ValueError(
            f"density {budget:g} is too little for pieces of {length:,} tokens: the sparsest choice reads {least:.4f} of all "
            "pairs; raise density, or choose on longer texts"
        )
    chosen = best_choice(kept, costs, most)
    return LayerPlan(
        tuple(
            Choice(layer_key(layer), held[at], density[at], shares[at])
            for layer, held, density, shares, at in zip(layers, options, densities, kept, chosen, strict=True)
        ),
        length,
        texts,
        budget,
    )


def layer_key(layer: Layer) -> str:
    """Return the name of a layer in an entry."""
    return f"{layer.stack}.{layer.index}" if layer.stack else str(layer.index)


def pattern_name(pattern: Pattern | None) -> str:
    """Return a pattern as people would write it: the fields that differ from their defaults; None is "dense"."""
    if pattern is None:
        return "dense"
    if isinstance(pattern, Union):
        return " | ".join(map(pattern_name, pattern.patterns))
    if isinstance(pattern, ByHead):
        held = zip(pattern.heads, pattern.patterns, strict=True)
        return "; ".join(f"heads {', '.join(map(str, heads))}: {pattern_name(one)}" for heads, one in held)
    fields = ((one.name, getattr(pattern, one.name), one.default) for one in dataclasses.fields(pattern))
    said = (f"{name}={_short(value)}" for name, value, default in fields if value != default)
    return f"{pattern.key}({', '.join(said)})"


def _short(value: Any) -> str:
    """Return a value as JSON; of a long run of positions only the ends."""
    if isinstance(value, tuple) and len(value) > 4 and value == tuple(range(value[0], value[0] + len(value))):
        return f"[{value[0]}, ..., {value[-1]}]"
    return json.dumps(value)
