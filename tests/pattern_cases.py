"""The patterns that every law is tried on, each with the loop rule that says what it should be."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import hf_sparse
from hf_sparse.parts import BlockTable, Scope
from hf_sparse.patterns import Pattern
from tests.support import rules, system_rules
from tests.support.rules import Rule

HEADS = 4
BACKENDS = ("dense", "gather", "auto")


@dataclass(frozen=True)
class Setting:
    """What a rule may depend on besides positions; ``positions`` of a global mask replace the pattern's own."""

    n: int
    layer: int = 0
    is_causal: bool = False
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Case:
    """A pattern for ``HEADS`` heads and its rule.

    Attributes:
        name: names the test.
        pattern: what is tried.
        rule: the oracle's definition under a setting.
        is_never_empty: whether every token reads at least one, whatever the length.
        in_flex: whether the backend "flex" serves it.
    """

    name: str
    pattern: Pattern
    rule: Callable[[Setting], Rule]
    is_never_empty: bool = True
    in_flex: bool = True

    @functools.cache  # noqa: B019 - the cases live as long as the tests do
    def mask(self, setting: Setting) -> Tensor:
        """Draw the rule: bool ``[HEADS, n, n]``."""
        return rules.draw(self.rule(setting), setting.n, heads=HEADS, is_causal=setting.is_causal)


def random_table(pattern: Pattern, setting: Setting, *, heads: int = HEADS) -> list[list[set[int]]]:
    """Return the random blocks that a pattern drew, as given: ``tests/patterns`` says what they have to be."""
    scope = Scope(setting.n, heads, setting.layer, setting.is_causal)
    (table,) = (part.table for part in pattern.parts(scope) if isinstance(part, BlockTable))
    rows = table.expand(heads, -1, -1).tolist()
    return [[{block for block in row if block >= 0} for row in head] for head in rows]


def _random(pattern: Pattern, block: int) -> Callable[[Setting], Rule]:
    return lambda s: rules.random_blocks(block, random_table(pattern, s))


def _bigbird(pattern: Pattern, block: int) -> Callable[[Setting], Rule]:
    return lambda s: rules.bigbird(block, s.n, random_table(pattern, s), is_causal=s.is_causal)


def _global(own: tuple[int, ...], s: Setting) -> tuple[int, ...]:
    return own if s.positions is None else s.positions


def _drawn(table: Callable[..., Tensor], *, by_layer: bool = False, **settings: Any) -> Callable[[Setting], Rule]:
    """Return a rule that looks pairs up in a table, which is drawn without regard to causality."""

    @functools.cache
    def draw(n: int, layer: int) -> list[Any]:
        drawn: list[Any] = table(n, **settings, **({"layer": layer} if by_layer else {})).tolist()
        return drawn

    def rule_of(s: Setting) -> Rule:
        held = draw(s.n, s.layer)
        return lambda h, q, k: held[h % len(held)][q][k]

    return rule_of


def _case(name: str, pattern: Pattern, rule: Callable[[Setting], Rule], **claims: bool) -> Case:
    return Case(name, pattern, rule, **claims)


_make = hf_sparse.pattern
_RANDOM = _make("random", block_size=8, num_random_blocks=2, seed=3)
_RANDOM_ONE = _make("random", block_size=4, num_random_blocks=1)
_BIGBIRD = _make("bigbird", block_size=8, num_random_blocks=2)
_BIGBIRD_FULL = _make("bigbird", block_size=8, num_random_blocks=2, random_plan="full_length")
_BIGBIRD_PADDED = _make("bigbird", block_size=8, num_random_blocks=2, length="padded")

CASES = (
    _case("band", _make("band", radius=3), lambda s: rules.band(3)),
    _case("dilated", _make("dilated", radius=2, dilation=3), lambda s: rules.dilated(2, 3)),
    _case("strided", _make("strided", stride=5), lambda s: rules.strided(5)),
    _case("block_local", _make("block_local", block_size=8), lambda s: rules.block_local(8)),
    _case(
        "global",
        _make("global", positions=(0, 5, 30)),
        lambda s: rules.global_tokens(_global((0, 5, 30), s)),
        is_never_empty=False,
    ),
    _case("random", _RANDOM, _random(_RANDOM, 8), is_never_empty=False),
    _case(
        "longformer",
        _make("longformer", window=6, global_tokens=(0, 9)),
        lambda s: rules.longformer(6, _global((0, 9), s)),
    ),
    _case(
        "longformer_dilated_by_head",
        _make("longformer", window=4, global_tokens=(2,), dilation=(1, 3, 1, 2)),
        lambda s: rules.longformer(4, _global((2,), s), dilation=(1, 3, 1, 2)),
    ),
    _case(
        "longformer_window_by_layer",
        _make("longformer", window=(4, 10)),
        lambda s: rules.longformer((4, 10), _global((), s), layer=s.layer),
    ),
    _case("bigbird_published", _BIGBIRD, _bigbird(_BIGBIRD, 8)),
    _case("bigbird_full_length", _BIGBIRD_FULL, _bigbird(_BIGBIRD_FULL, 8)),
    _case("bigbird_padded", _BIGBIRD_PADDED, _bigbird(_BIGBIRD_PADDED, 8)),
    _case(
        "sparse_fixed",
        _make("sparse_transformer", stride=8, summary=3),
        _drawn(system_rules.sparse_transformer, kind="fixed", stride=8, summary=3),
        in_flex=False,
    ),
    _case(
        "sparse_fixed_separate",
        _make("sparse_transformer", stride=8, summary=3, heads="separate"),
        _drawn(
            system_rules.sparse_transformer, kind="fixed", stride=8, summary=3, heads_mode="separate", num_heads=HEADS
        ),
        is_never_empty=False,
        in_flex=False,
    ),
    _case(
        "sparse_strided_interleaved",
        _make("sparse_transformer", kind="strided", stride=5, heads="interleaved", summary=1),
        _drawn(
            system_rules.sparse_transformer,
            kind="strided",
            stride=5,
            summary=1,
            heads_mode="interleaved",
            by_layer=True,
        ),
    ),
    _case(
        "image_1d",
        _make("image_1d", block_size=8, memory=5, num_prefix_tokens=2),
        _drawn(system_rules.image_1d, block_size=8, memory=5, num_prefix_tokens=2),
        in_flex=False,
    ),
    _case(
        "image_2d",
        _make("image_2d", width=9, query_block=(2, 4), flange=(1, 2), num_prefix_tokens=1),
        _drawn(system_rules.image_2d, width=9, query_block=(2, 4), flange=(1, 2), num_prefix_tokens=1),
        in_flex=False,
    ),
    _case(
        "axial",
        _make("axial", width=7, num_prefix_tokens=1),
        _drawn(system_rules.axial, width=7, num_prefix_tokens=1, by_layer=True),
        in_flex=False,
    ),
    _case(
        "union_of_windows",
        _make("band", radius=2) | _make("strided", stride=7),
        lambda s: rules.union(rules.band(2), rules.strided(7)),
    ),
    _case(
        "union_of_all_atoms",
        _make("block_local", block_size=6)
        | _make("global", positions=(1, 40))
        | _RANDOM
        | _RANDOM_ONE
        | _make("dilated", radius=2, dilation=2)
        | _make("band", radius=1),
        lambda s: rules.union(
            rules.block_local(6),
            rules.global_tokens(_global((1, 40), s)),
            _random(_RANDOM, 8)(s),
            _random(_RANDOM_ONE, 4)(s),
            rules.dilated(2, 2),
            rules.band(1),
        ),
    ),
    _case(
        "by_head",
        hf_sparse.by_head(
            {
                (0, 2): _make("band", radius=2) | _make("global", positions=(3,)),
                1: _BIGBIRD_FULL,
                3: _RANDOM | _make("strided", stride=4),
            }
        ),
        lambda s: rules.by_head(
            {head: rules.union(rules.band(2), rules.global_tokens(_global((3,), s))) for head in (0, 2)}
            | {1: _bigbird(_BIGBIRD_FULL, 8)(s), 3: rules.union(_random(_RANDOM, 8)(s), rules.strided(4))}
        ),
    ),
)
IN_FLEX = tuple(case for case in CASES if case.in_flex)
NEVER_EMPTY = tuple(case for case in CASES if case.is_never_empty)
WITH_GLOBALS = tuple(case for case in CASES if case.pattern.has_global_tokens)


# what SAMPLE covers: columns, sets of queries of their own, windows and globals on some heads, blocks and globals, nothing but
# random blocks, all parts at once, heads that differ
SAMPLE = (
    "sparse_fixed",
    "image_2d",
    "longformer_dilated_by_head",
    "bigbird_published",
    "random",
    "union_of_all_atoms",
    "by_head",
)


def sampled(cases: tuple[Case, ...] = CASES, names: tuple[str, ...] = SAMPLE) -> list[Any]:
    """Return parameters of a test: a few cases always, the others where slow tests run too."""
    marks = {case.name: () if case.name in names else pytest.mark.slow for case in cases}
    return [pytest.param(case, marks=marks[case.name], id=case.name) for case in cases]


def attention(pattern: Pattern, **settings: Any) -> Callable[..., Any]:
    """Return the library's attention with all settled but the tensors."""
    return functools.partial(hf_sparse.sparse_attention, pattern=pattern, **settings)


def case_of(name: str) -> Case:
    """Return a case by its name."""
    return next(case for case in CASES if case.name == name)


def case_name(case: Case) -> str:
    """Name a case in a test's identity."""
    return case.name
