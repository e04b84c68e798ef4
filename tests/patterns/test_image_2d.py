"""Image Transformer in two dimensions: a rectangle of pixels and the flange around it, in raster or in block order."""

from typing import Any

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "height, width, query_block, flange, num_prefix_tokens, order"
# 2 rows of 3 pixels, cut into blocks of 2 + 1 pixels a row
SIDEWAYS = {"width": 3, "query_block": (1, 2), "flange": (0, 1)}
UPWARDS = {"width": 3, "query_block": (1, 2), "flange": (1, 0)}
UPWARDS_ROWS = ("xx.xx.", "xx.xx.", "..x..x", "xx.xx.", "xx.xx.", "..x..x")
UPWARDS_CAUSAL = ("x.....", "xx....", "..x...", "xx.x..", "xx.xx.", "..x..x")
# the same image, column by column
BLOCKS = {"height": 2, "width": 3, "query_block": (2, 1), "flange": (0, 1), "order": "block"}
BLOCKS_ROWS = ("xxxx..", "xxxx..", "xxxxxx", "xxxxxx", "..xxxx", "..xxxx")
BLOCKS_CAUSAL = ("x.....", "xx....", "xxx...", "xxxx..", "..xxx.", "..xxxx")
SQUARE = {"query_block": (2, 1), "flange": (0, 0), "num_prefix_tokens": 1}
DRAWINGS = {
    "sideways": Drawing(SIDEWAYS, ("xxx...", "xxx...", ".xx...", "...xxx", "...xxx", "....xx")),
    "upwards": Drawing(UPWARDS, UPWARDS_ROWS),
    "upwards_causal": Drawing(UPWARDS, UPWARDS_CAUSAL, is_causal=True),
    "last_row_incomplete": Drawing(UPWARDS, tuple(row[:5] for row in UPWARDS_ROWS[:5])),
    "blocks": Drawing(BLOCKS, BLOCKS_ROWS),
    "blocks_causal": Drawing(BLOCKS, BLOCKS_CAUSAL, is_causal=True),
    "square": Drawing(SQUARE, ("xxxxx", "xx.x.", "x.x.x", "xx.x.", "x.x.x")),
    "square_causal": Drawing(SQUARE, ("x....", "xx...", "x.x..", "xx.x.", "x.x.x"), is_causal=True),
    "square_of_blocks": Drawing({**SQUARE, "order": "block"}, ("xxxxx", "xxx..", "xxx..", "x..xx", "x..xx")),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())
by_prefix = pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.image_2d(drawing.n, **drawing.fields, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("image_2d", drawing)


def check_rule(n: int, fields: dict[str, Any], *, is_causal: bool) -> None:
    """Compare the pattern with the rule at one length."""
    wanted = system_rules.image_2d(n, **fields, is_causal=is_causal)
    checks.check_table(hf_sparse.pattern("image_2d", **fields), wanted, n, heads=2, layer=1, is_causal=is_causal)


@checks.both_ways
@by_prefix
@pytest.mark.parametrize(
    ("width", "query_block", "flange"),
    [
        (8, (2, 4), (1, 2)),
        (7, (3, 2), (0, 3)),
        (5, (1, 1), (2, 0)),
        (16, (8, 16), (8, 16)),
        (9, (4, 3), (7, 1)),
        (1, (2, 1), (1, 1)),
        (300, (1, 16), (1, 4)),
    ],
)
def test_masks_in_raster_order_equal_the_rule(
    width: int, query_block: tuple[int, int], flange: tuple[int, int], num_prefix_tokens: int, is_causal: bool
) -> None:
    fields = {"width": width, "query_block": query_block, "flange": flange, "num_prefix_tokens": num_prefix_tokens}
    for n in checks.lengths(query_block[0] * min(width, 50) + num_prefix_tokens, longest=257):
        # whether a prefix without an image fits is not said
        if n > num_prefix_tokens:
            check_rule(n, fields, is_causal=is_causal)


@checks.both_ways
@by_prefix
@pytest.mark.parametrize("order", ["raster", "block"])
@pytest.mark.parametrize("side", [1, 2, 6, 16])
def test_without_a_width_the_image_is_square(side: int, order: str, num_prefix_tokens: int, is_causal: bool) -> None:
    block = 2 if side % 2 == 0 else 1
    fields = {"query_block": (block, block), "flange": (1, 2), "order": order, "num_prefix_tokens": num_prefix_tokens}
    check_rule(num_prefix_tokens + side * side, fields, is_causal=is_causal)


@checks.both_ways
@by_prefix
@pytest.mark.parametrize("gives_height", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "query_block", "flange"),
    [
        (4, 6, (2, 3), (1, 2)),
        (6, 4, (3, 1), (0, 2)),
        (8, 8, (4, 2), (5, 0)),
        (8, 32, (8, 16), (8, 16)),
        (2, 9, (1, 3), (1, 1)),
    ],
)
def test_masks_in_block_order_equal_the_rule(
    height: int,
    width: int,
    query_block: tuple[int, int],
    flange: tuple[int, int],
    gives_height: bool,
    num_prefix_tokens: int,
    is_causal: bool,
) -> None:
    fields = {
        "height": height if gives_height else None,
        "width": width,
        "query_block": query_block,
        "flange": flange,
        "order": "block",
        "num_prefix_tokens": num_prefix_tokens,
    }
    check_rule(num_prefix_tokens + height * width, fields, is_causal=is_causal)


def test_in_block_order_the_past_is_the_strips_above_and_to_the_left_of_the_published_code() -> None:
    height, width, (high, wide), (above, beside) = 8, 12, (2, 3), (1, 2)
    pattern = hf_sparse.pattern(
        "image_2d", height=height, width=width, query_block=(high, wide), flange=(above, beside), order="block"
    )
    drawn = pattern.mask(height * width, is_causal=True)[0]
    # (row, column) of each position, block by block
    places = [
        (row + r, column + c)
        for row in range(0, height, high)
        for column in range(0, width, wide)
        for r in range(high)
        for c in range(wide)
    ]
    for q, (query_row, query_column) in enumerate(places):
        top, left = query_row // high * high, query_column // wide * wide
        for k, (row, column) in enumerate(places):
            is_own = top <= row < top + high and left <= column < left + wide and k <= q
            is_above = top - above <= row < top and left - beside <= column < left + wide + beside
            is_left = top <= row < top + high and left - beside <= column < left
            assert bool(drawn[q, k]) == (is_own or is_above or is_left), (q, k)


def test_a_length_without_a_square_is_refused_where_no_width_is_given() -> None:
    for n, prefix in ((2, 0), (10, 0), (257, 0), (9, 1)):
        pattern = hf_sparse.pattern("image_2d", num_prefix_tokens=prefix)
        with pytest.raises(ValueError, match="width"):
            pattern.mask(n)


def test_more_pixels_than_height_times_width_are_refused() -> None:
    pattern = hf_sparse.pattern("image_2d", height=2, width=3, num_prefix_tokens=1)
    assert pattern.mask(7).all()
    with pytest.raises(ValueError, match="height"):
        pattern.mask(8)


@pytest.mark.parametrize(
    ("height", "width", "query_block", "n"),
    [(3, 4, (2, 2), 12), (4, 3, (2, 2), 12), (4, 4, (2, 2), 15), (4, 4, (2, 2), 8), (None, 4, (2, 2), 10)],
    ids=["height_not_in_blocks", "width_not_in_blocks", "one_missing", "two_rows_missing", "last_row_incomplete"],
)
def test_an_image_that_is_not_all_blocks_is_refused_in_block_order(
    height: int | None, width: int, query_block: tuple[int, int], n: int
) -> None:
    fields = {"height": height, "width": width, "query_block": query_block}
    assert hf_sparse.pattern("image_2d", **fields).mask(n).any()
    with pytest.raises(ValueError, match=r"height|width|query_block|order"):
        hf_sparse.pattern("image_2d", **fields, order="block").mask(n)


def test_it_has_no_nodes_and_no_layer_differs() -> None:
    pattern = hf_sparse.pattern("image_2d", width=4)
    assert [pattern.num_nodes(n) for n in (1, 257)] == [0, 0]
    assert not pattern.varies_by_layer


def test_fields_and_defaults() -> None:
    checks.check_fields(
        "image_2d",
        {
            "height": None,
            "width": None,
            "query_block": [8, 16],
            "flange": [8, 16],
            "num_prefix_tokens": 0,
            "order": "raster",
        },
    )


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("image_2d"))
    checks.check_round_trip(hf_sparse.pattern("image_2d", **BLOCKS, num_prefix_tokens=2))


def test_lists_and_tuples_are_the_same() -> None:
    lists = hf_sparse.pattern("image_2d", query_block=[2, 3], flange=[1, 0])
    assert lists == hf_sparse.pattern("image_2d", query_block=(2, 3), flange=(1, 0))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("image_2d", FIELDS)


def test_bad_counts_are_refused() -> None:
    checks.check_count_field("image_2d", "num_prefix_tokens", least=0)
    for field in ("height", "width"):
        checks.check_bad_values("image_2d", field, 0, -7)
        checks.check_wrong_kinds("image_2d", field, 2.0, "2", True)


@pytest.mark.parametrize(("field", "least"), [("query_block", 1), ("flange", 0)])
def test_bad_pairs_are_refused(field: str, least: int) -> None:
    assert hf_sparse.pattern("image_2d", **{field: (least, least)})
    for bad in ((least - 1, 4), (4, -7)):
        with pytest.raises(ValueError, match=field):
            hf_sparse.pattern("image_2d", **{field: bad})
    for wrong in (8, (8,), (8, 8, 8), (8.0, 8), ("8", 8), (True, 8), None):
        with pytest.raises((TypeError, ValueError), match=field):
            hf_sparse.pattern("image_2d", **{field: wrong})


def test_bad_orders_are_refused() -> None:
    checks.check_bad_values("image_2d", "order", "full", "")
