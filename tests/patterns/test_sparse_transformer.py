"""Sparse Transformer: near keys and far keys, strided or fixed, on the same heads, on other heads or on other layers."""

from typing import Any

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules
from tests.support.rules import from_rows

FIELDS = "kind, stride, summary, heads, local_window"
FIXED = {"kind": "fixed", "stride": 3, "summary": 1}
STRIDED = {"kind": "strided", "stride": 2, "summary": 1}
MERGED_ROWS = ("x.....", "xx....", "xxx...", "..xx..", "..xxx.", "..xxxx")
STRIDED_ROWS = ("xxx.x.", "xxxx.x", "xxxxx.", ".xxxxx", "x.xxxx", ".x.xxx")
STRIDED_CAUSAL_ROWS = ("x.....", "xx....", "xxx...", ".xxx..", "x.xxx.", ".x.xxx")
BY_LAYER = {"heads": "interleaved"}
CODE = {"local_window": "code"}
DRAWINGS = {
    "fixed": Drawing(FIXED, ("xxx..x",) * 3 + ("..xxxx",) * 3),
    "fixed_causal": Drawing(FIXED, MERGED_ROWS, is_causal=True),
    "fixed_two_columns": Drawing({**FIXED, "summary": 2}, ("xxx.x",) * 3 + (".xxxx",) * 2),
    "fixed_even_layer": Drawing({**FIXED, **BY_LAYER}, ("xxx..",) * 3 + ("...xx",) * 2, layer=2),
    "fixed_odd_layer": Drawing({**FIXED, **BY_LAYER}, ("..x..x",) * 6, layer=1),
    "fixed_odd_layer_causal": Drawing(
        {**FIXED, **BY_LAYER}, ("......", "......", "..x...", "..x...", "..x...", "..x..x"), layer=3, is_causal=True
    ),
    "strided": Drawing(STRIDED, STRIDED_ROWS),
    "strided_causal": Drawing(STRIDED, STRIDED_CAUSAL_ROWS, is_causal=True),
    "strided_as_in_the_code": Drawing({**STRIDED, **CODE}, STRIDED_ROWS),
    "strided_even_layer": Drawing({**STRIDED, **BY_LAYER}, ("xxx..", "xxxx.", "xxxxx", ".xxxx", "..xxx")),
    "strided_even_layer_as_in_the_code": Drawing({**STRIDED, **BY_LAYER, **CODE}, ("xx..", "xxx.", ".xxx", "..xx")),
    "strided_odd_layer": Drawing({**STRIDED, **BY_LAYER}, ("x.x.x", ".x.x.", "x.x.x", ".x.x.", "x.x.x"), layer=1),
    "strided_odd_layer_causal": Drawing(
        {**STRIDED, **BY_LAYER}, ("x....", ".x...", "x.x..", ".x.x.", "x.x.x"), layer=1, is_causal=True
    ),
    "separate_alone": Drawing({**FIXED, "heads": "separate"}, ("xxx..",) * 3 + ("...xx",) * 2),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


def rule_mask(n: int, fields: dict[str, Any], **settings: Any) -> torch.Tensor:
    """Draw the rule of a pattern with these fields."""
    fields = {"heads": "merged", **fields}
    return system_rules.sparse_transformer(n, heads_mode=fields.pop("heads"), **fields, **settings)


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = rule_mask(drawing.n, drawing.fields, layer=drawing.layer, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("sparse_transformer", drawing)


# near heads first; the far heads of "fixed" take their columns from the end of a block, in turn
HEADS = {
    "fixed": (
        {"kind": "fixed", "stride": 2, "summary": 1, "heads": "separate"},
        [("xx..", "xx..", "..xx", "..xx")] * 3 + [(".x.x",) * 4, ("x.x.",) * 4],
    ),
    "fixed_slots_start_again": (
        {"kind": "fixed", "stride": 3, "summary": 2, "heads": "separate"},
        [("xxx.", "xxx.", "xxx.", "...x")] * 2 + [(".xx.",) * 4] * 2,
    ),
    "strided": (
        {"kind": "strided", "stride": 2, "summary": 1, "heads": "separate"},
        [("xxx.", "xxxx", "xxxx", ".xxx")] * 2 + [("x.x.", ".x.x", "x.x.", ".x.x")],
    ),
}
by_head = pytest.mark.parametrize(("fields", "rows"), HEADS.values(), ids=HEADS.keys())


@by_head
def test_the_rule_of_separate_heads_is_what_was_drawn_by_hand(
    fields: dict[str, Any], rows: list[tuple[str, ...]]
) -> None:
    for is_causal in (False, True):
        wanted = torch.cat([from_rows(*head) for head in rows])
        drawn = rule_mask(4, fields, num_heads=len(rows), is_causal=is_causal)
        assert torch.equal(drawn, wanted.tril() if is_causal else wanted), drawn.int()


@by_head
def test_separate_heads_are_what_was_drawn_by_hand(fields: dict[str, Any], rows: list[tuple[str, ...]]) -> None:
    pattern = hf_sparse.pattern("sparse_transformer", **fields)
    wanted = torch.cat([from_rows(*head) for head in rows])
    checks.check_table(pattern, wanted, 4)
    checks.check_table(pattern, wanted.tril(), 4, is_causal=True)


@checks.both_ways
@pytest.mark.parametrize("heads", ["merged", "interleaved", "separate"])
@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "fixed", "stride": 8, "summary": 2},
        {"kind": "fixed", "stride": 7, "summary": 3},
        {"kind": "fixed", "stride": 16, "summary": 16},
        {"kind": "strided", "stride": 8, "summary": 1},
        {"kind": "strided", "stride": 5, "summary": 1, "local_window": "code"},
        {"kind": "strided", "stride": 1, "summary": 1},
    ],
    ids=str,
)
def test_masks_equal_the_rule(fields: dict[str, Any], heads: str, is_causal: bool) -> None:
    fields = {**fields, "heads": heads}
    pattern = hf_sparse.pattern("sparse_transformer", **fields)
    for n in checks.lengths(fields["stride"], longest=257):
        for layer in (0, 1) if heads == "interleaved" else (1,):
            num_heads = 5 if heads == "separate" else 1
            wanted = rule_mask(n, fields, num_heads=num_heads, layer=layer, is_causal=is_causal)
            checks.check_table(pattern, wanted, n, heads=max(2, num_heads), layer=layer, is_causal=is_causal)


@checks.both_ways
def test_the_defaults_are_fixed_blocks_of_128_with_32_columns(is_causal: bool) -> None:
    wanted = rule_mask(257, {"kind": "fixed", "stride": 128, "summary": 32}, is_causal=is_causal)
    checks.check_table(hf_sparse.pattern("sparse_transformer"), wanted, 257, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["fixed", "strided"])
def test_two_merged_layers_reach_the_whole_past(kind: str) -> None:
    pattern = hf_sparse.pattern("sparse_transformer", kind=kind, stride=6, summary=2)
    reads = pattern.mask(65, is_causal=True)[0].double()
    assert torch.equal((reads @ reads) > 0, torch.ones(65, 65).tril().bool())


def test_a_far_layer_of_fixed_blocks_leaves_the_first_rows_empty() -> None:
    pattern = hf_sparse.pattern("sparse_transformer", stride=8, summary=2, heads="interleaved")
    rows = pattern.mask(20, layer=1, is_causal=True)[0].any(-1)
    assert rows.tolist() == [False] * 6 + [True] * 14


def test_only_interleaved_layers_differ() -> None:
    for heads in ("merged", "separate", "interleaved"):
        pattern = hf_sparse.pattern("sparse_transformer", heads=heads)
        assert pattern.varies_by_layer == (heads == "interleaved")


def test_it_has_no_nodes() -> None:
    assert [hf_sparse.pattern("sparse_transformer").num_nodes(n) for n in (1, 257)] == [0, 0]


def test_fields_and_defaults() -> None:
    defaults = {"kind": "fixed", "stride": 128, "summary": 32, "heads": "merged", "local_window": "paper"}
    checks.check_fields("sparse_transformer", defaults)


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("sparse_transformer"))
    checks.check_round_trip(hf_sparse.pattern("sparse_transformer", **STRIDED, **CODE, heads="separate"))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("sparse_transformer", FIELDS)


def test_bad_counts_are_refused() -> None:
    checks.check_bad_values("sparse_transformer", "stride", 0, -7, summary=1)
    checks.check_bad_values("sparse_transformer", "summary", 0, -7)
    for field in ("stride", "summary"):
        checks.check_wrong_kinds("sparse_transformer", field, 2.0, "2", None, True)


def test_more_columns_than_a_block_has_are_refused() -> None:
    assert hf_sparse.pattern("sparse_transformer", stride=4, summary=4).mask(9).all()
    with pytest.raises(ValueError, match="summary"):
        hf_sparse.pattern("sparse_transformer", stride=4, summary=5)


@pytest.mark.parametrize("field", ["kind", "heads", "local_window"])
def test_bad_choices_are_refused(field: str) -> None:
    checks.check_bad_values("sparse_transformer", field, "full", "")
