"""Star-Transformer: a ring of tokens and relays that everything reads and that read everything."""

from typing import Any

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "radius, num_relays, cyclic, relay_projections"
OPEN = {"radius": 1, "num_relays": 2, "cyclic": False}
DRAWINGS = {
    "ring": Drawing({}, ("xx..x x", "xxx.. x", ".xxx. x", "..xxx x", "x..xx x", "xxxxx x"), 5),
    "ring_causal": Drawing({}, ("x.... x", "xx... x", ".xx.. x", "..xx. x", "...xx x", "..... x"), 5, True),
    "open": Drawing(OPEN, ("xx.. xx", "xxx. xx", ".xxx xx", "..xx xx", "xxxx xx", "xxxx xx"), 4),
    "open_causal": Drawing(OPEN, ("x... xx", "xx.. xx", ".xx. xx", "..xx xx", ".... xx", ".... xx"), 4, True),
    "two_steps": Drawing(
        {"radius": 2}, ("xxx.xx x", "xxxx.x x", "xxxxx. x", ".xxxxx x", "x.xxxx x", "xx.xxx x", "xxxxxx x"), 6
    ),
    "alone": Drawing({}, ("x x", "x x"), 1),
    "alone_causal": Drawing({}, ("x x", ". x"), 1, True),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.star(drawing.n, **drawing.fields, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("star", drawing)


@checks.both_ways
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"radius": 3},
        {"radius": 3, "cyclic": False},
        {"radius": 8, "num_relays": 3},
        {"radius": 300, "num_relays": 2},
    ],
    ids=str,
)
def test_masks_equal_the_rule(fields: dict[str, Any], is_causal: bool) -> None:
    pattern = hf_sparse.pattern("star", **fields)
    for n in checks.lengths(2 * pattern.radius + 1 if pattern.radius < 100 else 8, longest=257):
        wanted = system_rules.star(n, **fields, is_causal=is_causal)
        checks.check_table(pattern, wanted, n, heads=2, layer=1, is_causal=is_causal)


@pytest.mark.parametrize("cyclic", [True, False])
def test_no_path_through_relays_reaches_the_future(cyclic: bool) -> None:
    checks.check_no_leak(hf_sparse.pattern("star", radius=2, num_relays=2, cyclic=cyclic), 13)


def test_there_are_as_many_nodes_as_relays() -> None:
    for n in (1, 2, 257):
        assert hf_sparse.pattern("star").num_nodes(n) == 1
        assert hf_sparse.pattern("star", num_relays=5).num_nodes(n) == 5


def test_fields_and_defaults() -> None:
    checks.check_fields("star", {"radius": 1, "num_relays": 1, "cyclic": True, "relay_projections": True})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("star"))
    checks.check_round_trip(hf_sparse.pattern("star", **OPEN))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("star", FIELDS)


@pytest.mark.parametrize("field", ["radius", "num_relays"])
def test_bad_counts_are_refused(field: str) -> None:
    checks.check_bad_values("star", field, -1, -7)
    checks.check_wrong_kinds("star", field, 2.0, "2", None, True)


@pytest.mark.parametrize("field", ["cyclic", "relay_projections"])
def test_switches_are_on_or_off(field: str) -> None:
    checks.check_wrong_kinds("star", field, 1, "yes", None)
