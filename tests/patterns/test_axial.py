"""Axial Transformer: every pixel reads its row or its column."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns import shifted_axial
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "height, width, axis, num_prefix_tokens"
# 2 rows of 3 pixels
ROWS = ("xxx...",) * 3 + ("...xxx",) * 3
ROWS_CAUSAL = ("x.....", "xx....", "xxx...", "...x..", "...xx.", "...xxx")
COLUMNS = ("x..x..", ".x..x.", "..x..x") * 2
COLUMNS_CAUSAL = ("x.....", ".x....", "..x...", "x..x..", ".x..x.", "..x..x")
ROW, COLUMN, BY_LAYER = ({"width": 3, "axis": axis} for axis in ("row", "column", "alternate"))
SQUARE = {"num_prefix_tokens": 1}
DRAWINGS = {
    "row": Drawing(ROW, ROWS, layer=1),
    "row_causal": Drawing(ROW, ROWS_CAUSAL, is_causal=True),
    "column": Drawing(COLUMN, COLUMNS),
    "column_causal": Drawing(COLUMN, COLUMNS_CAUSAL, is_causal=True),
    "even_layer": Drawing(BY_LAYER, ROWS, layer=2),
    "odd_layer": Drawing(BY_LAYER, COLUMNS, layer=3),
    "odd_layer_causal": Drawing(BY_LAYER, COLUMNS_CAUSAL, layer=1, is_causal=True),
    "last_row_incomplete": Drawing(ROW, ("xxx..",) * 3 + ("...xx",) * 2),
    "square_even_layer": Drawing(SQUARE, ("xxxxx", "xxx..", "xxx..", "x..xx", "x..xx")),
    "square_odd_layer": Drawing(SQUARE, ("xxxxx", "xx.x.", "x.x.x", "xx.x.", "x.x.x"), layer=1),
    "square_odd_layer_causal": Drawing(SQUARE, ("x....", "xx...", "x.x..", "xx.x.", "x.x.x"), layer=1, is_causal=True),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())
by_prefix = pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
by_axis = pytest.mark.parametrize("axis", ["row", "column", "alternate"])


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.axial(drawing.n, **drawing.fields, layer=drawing.layer, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("axial", drawing)


def check_rule(n: int, fields: dict[str, Any], *, is_causal: bool) -> None:
    """Compare the pattern with the rule at one length, on an even and on an odd layer."""
    for layer in (0, 1) if fields["axis"] == "alternate" else (1,):
        wanted = system_rules.axial(n, **fields, layer=layer, is_causal=is_causal)
        checks.check_table(hf_sparse.pattern("axial", **fields), wanted, n, heads=2, layer=layer, is_causal=is_causal)


@checks.both_ways
@by_prefix
@by_axis
@pytest.mark.parametrize("width", [1, 8, 16, 64, 300])
def test_masks_equal_the_rule(width: int, axis: str, num_prefix_tokens: int, is_causal: bool) -> None:
    fields = {"width": width, "axis": axis, "num_prefix_tokens": num_prefix_tokens}
    for n in checks.lengths(min(width, 100) + num_prefix_tokens, longest=257):
        # whether a prefix without an image fits is not said
        if n > num_prefix_tokens:
            check_rule(n, fields, is_causal=is_causal)


@checks.both_ways
@by_prefix
@by_axis
def test_without_a_width_the_image_is_square(axis: str, num_prefix_tokens: int, is_causal: bool) -> None:
    for side in (1, 2, 7, 16):
        check_rule(
            num_prefix_tokens + side * side,
            {"axis": axis, "num_prefix_tokens": num_prefix_tokens},
            is_causal=is_causal,
        )


def test_a_row_layer_and_a_column_layer_reach_the_whole_image() -> None:
    pattern = hf_sparse.pattern("axial", width=6, num_prefix_tokens=1)
    row, column = (pattern.mask(1 + 4 * 6, layer=layer)[0].double() for layer in (0, 1))
    assert ((row @ column) > 0).all()
    assert ((column @ row) > 0).all()


def test_only_alternating_layers_differ() -> None:
    for axis in ("row", "column", "alternate"):
        assert hf_sparse.pattern("axial", axis=axis).varies_by_layer == (axis == "alternate")


def test_it_has_no_nodes() -> None:
    assert [hf_sparse.pattern("axial", width=4).num_nodes(n) for n in (1, 257)] == [0, 0]


def test_a_length_without_a_square_is_refused_where_no_width_is_given() -> None:
    for n, prefix in ((2, 0), (10, 0), (257, 0), (9, 1)):
        pattern = hf_sparse.pattern("axial", num_prefix_tokens=prefix)
        with pytest.raises(ValueError, match="width"):
            pattern.mask(n)


def test_more_pixels_than_height_times_width_are_refused() -> None:
    pattern = hf_sparse.pattern("axial", height=2, width=3, num_prefix_tokens=1)
    assert pattern.mask(7).any()
    with pytest.raises(ValueError, match="height"):
        pattern.mask(8)


def test_fields_and_defaults() -> None:
    checks.check_fields("axial", {"height": None, "width": None, "axis": "alternate", "num_prefix_tokens": 0})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("axial"))
    checks.check_round_trip(hf_sparse.pattern("axial", height=4, width=5, axis="column", num_prefix_tokens=2))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("axial", FIELDS)


def test_bad_counts_are_refused() -> None:
    checks.check_count_field("axial", "num_prefix_tokens", least=0)
    for field in ("height", "width"):
        checks.check_bad_values("axial", field, 0, -7)
        checks.check_wrong_kinds("axial", field, 2.0, "2", True)


def test_bad_axes_are_refused() -> None:
    checks.check_bad_values("axial", "axis", "diagonal", "")


def layers(axis: str, *, width: int, is_causal: bool) -> Callable[[Tensor], Tensor]:
    """Return one layer of attention with a residual, as wide as its states."""
    pattern = hf_sparse.pattern("axial", width=width, axis=axis)

    def run(hidden: Tensor) -> Tensor:
        heads = hidden[:, None]
        attended = hf_sparse.sparse_attention(heads, heads, heads, pattern, is_causal=is_causal)
        assert isinstance(attended, Tensor)
        return hidden + attended[:, 0]

    return run


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (5, 1), (4, 3), (3, 7)])
def test_shifted_rows_and_columns_see_the_whole_past_and_nothing_else(height: int, width: int) -> None:
    n = height * width
    torch.manual_seed(0)
    hidden = torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True)
    states = shifted_axial(
        hidden,
        width=width,
        whole_rows=layers("row", width=width, is_causal=False),
        columns=layers("column", width=width, is_causal=True),
        rows=layers("row", width=width, is_causal=True),
    )
    sees = [
        torch.autograd.grad(states[0, i].sum(), hidden, retain_graph=True)[0][0].abs().sum(-1) > 0 for i in range(n)
    ]
    assert torch.equal(torch.stack(sees), torch.ones(n, n).tril(-1).bool())


def test_causal_rows_and_columns_alone_miss_what_is_above_and_to_the_right() -> None:
    hidden = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    states = layers("column", width=3, is_causal=True)(layers("row", width=3, is_causal=True)(hidden))
    (gradient,) = torch.autograd.grad(states[0, 4].sum(), hidden)
    assert (gradient[0].abs().sum(-1) > 0).tolist() == [True, True, False, True, True, False, False, False, False]


def test_pixels_that_are_no_whole_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="width must divide the 10 pixels into whole rows, got 3"):
        shifted_axial(torch.randn(1, 10, 4), width=3, whole_rows=Tensor.clone, columns=Tensor.clone, rows=Tensor.clone)
