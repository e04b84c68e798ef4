"""ETC: a window, and global nodes for the whole text or one for each segment."""

from typing import Any

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "radius, num_global, max_relative_distance, segments, hard_global_to_long, hard_long_to_global"
TWO = {"radius": 1, "num_global": 2}
PAIRS = {"radius": 1, "num_global": 9, "segments": 2}
SOFT_TOKENS = ("xx... xxx", "xxx.. xxx", ".xxx. xxx", "..xxx xxx", "...xx xxx")
HARD_TOKENS = ("xx... x..", "xxx.. x..", ".xxx. .x.", "..xxx .x.", "...xx ..x")
SOFT_NODES = ("xxxxx xxx",) * 3
HARD_NODES = ("xx... xxx", "..xx. xxx", "....x xxx")
DRAWINGS = {
    "global": Drawing(TWO, ("xx.. xx", "xxx. xx", ".xxx xx", "..xx xx", "xxxx xx", "xxxx xx"), 4),
    "global_causal": Drawing(TWO, ("x... xx", "xx.. xx", ".xx. xx", "..xx xx", ".... xx", ".... xx"), 4, True),
    "segments": Drawing(PAIRS, SOFT_TOKENS + SOFT_NODES, 5),
    "segments_read_their_own": Drawing({**PAIRS, "hard_global_to_long": True}, SOFT_TOKENS + HARD_NODES, 5),
    "segments_are_read_by_their_own": Drawing({**PAIRS, "hard_long_to_global": True}, HARD_TOKENS + SOFT_NODES, 5),
    "segments_hard_both_ways": Drawing(
        {**PAIRS, "hard_global_to_long": True, "hard_long_to_global": True}, HARD_TOKENS + HARD_NODES, 5
    ),
    "alone": Drawing({"segments": 4}, ("x x", "x x"), 1),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.etc(drawing.n, **{"radius": 84, **drawing.fields}, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("etc", drawing)


@checks.both_ways
@pytest.mark.parametrize(("radius", "num_global"), [(1, 1), (7, 3), (64, 20), (300, 2)])
def test_masks_with_global_nodes_equal_the_rule(radius: int, num_global: int, is_causal: bool) -> None:
    pattern = hf_sparse.pattern("etc", radius=radius, num_global=num_global)
    for n in checks.lengths(min(radius, 100) + 1, longest=257):
        wanted = system_rules.etc(n, radius=radius, num_global=num_global, is_causal=is_causal)
        checks.check_table(pattern, wanted, n, heads=2, layer=1, is_causal=is_causal)


@pytest.mark.parametrize("hard_global_to_long", [False, True], ids=["soft_g2l", "hard_g2l"])
@pytest.mark.parametrize("hard_long_to_global", [False, True], ids=["soft_l2g", "hard_l2g"])
@pytest.mark.parametrize(("radius", "segments"), [(3, 1), (2, 8), (20, 64), (5, 300)])
def test_masks_with_segments_equal_the_rule(
    radius: int, segments: int, hard_long_to_global: bool, hard_global_to_long: bool
) -> None:
    fields: dict[str, Any] = {
        "radius": radius,
        "segments": segments,
        "hard_global_to_long": hard_global_to_long,
        "hard_long_to_global": hard_long_to_global,
    }
    pattern = hf_sparse.pattern("etc", **fields)
    # a node for each token makes the table large
    for n in checks.lengths(min(segments, 100), longest=257 if segments > 1 else 65):
        checks.check_table(pattern, system_rules.etc(n, **fields), n, heads=2, layer=1)


def test_segments_and_causal_are_refused_together() -> None:
    pattern = hf_sparse.pattern("etc", radius=2, segments=4)
    with pytest.raises(ValueError, match="segments"):
        pattern.mask(9, is_causal=True)


def test_no_path_through_nodes_reaches_the_future() -> None:
    checks.check_no_leak(hf_sparse.pattern("etc", radius=2, num_global=3), 13)


def test_the_distance_of_relative_labels_changes_no_edge() -> None:
    near, far = (hf_sparse.pattern("etc", radius=3, num_global=2, max_relative_distance=d) for d in (1, 40))
    assert near != far
    assert torch.equal(near.mask(20), far.mask(20))


def test_there_is_a_node_for_each_segment_or_as_many_as_asked_for() -> None:
    assert [hf_sparse.pattern("etc").num_nodes(n) for n in (1, 4096)] == [256, 256]
    by_segment = hf_sparse.pattern("etc", segments=16, num_global=3)
    assert [by_segment.num_nodes(n) for n in (1, 15, 16, 17, 257)] == [1, 1, 1, 2, 17]


def test_fields_and_defaults() -> None:
    checks.check_fields(
        "etc",
        {
            "radius": 84,
            "num_global": 256,
            "max_relative_distance": 12,
            "segments": None,
            "hard_global_to_long": False,
            "hard_long_to_global": False,
        },
    )


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("etc"))
    checks.check_round_trip(
        hf_sparse.pattern(
            "etc", radius=3, max_relative_distance=4, segments=5, hard_global_to_long=True, hard_long_to_global=True
        )
    )


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("etc", FIELDS)


@pytest.mark.parametrize("field", ["radius", "num_global", "max_relative_distance"])
def test_bad_counts_are_refused(field: str) -> None:
    checks.check_bad_values("etc", field, -1, -7)
    checks.check_wrong_kinds("etc", field, 2.0, "2", None, True)


def test_bad_segments_are_refused() -> None:
    checks.check_bad_values("etc", "segments", 0, -7)
    checks.check_wrong_kinds("etc", "segments", 2.0, "2", True)


@pytest.mark.parametrize("field", ["hard_global_to_long", "hard_long_to_global"])
def test_masks_are_hard_or_not(field: str) -> None:
    checks.check_wrong_kinds("etc", field, 1, "yes", None)
