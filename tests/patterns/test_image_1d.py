"""Image Transformer in one dimension: a block of pixels and the memory around it."""

from typing import Any

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.patterns.checks import Drawing
from tests.support import system_rules

FIELDS = "block_size, memory, num_prefix_tokens"
PAIRS = {"block_size": 2, "memory": 1}
PAIRS_CAUSAL = ("x.....", "xx....", ".xx...", ".xxx..", "...xx.", "...xxx")
DRAWINGS = {
    "pairs": Drawing(PAIRS, ("xxx...", "xxx...", ".xxxx.", ".xxxx.", "...xxx", "...xxx")),
    "pairs_causal": Drawing(PAIRS, PAIRS_CAUSAL, is_causal=True),
    "no_memory": Drawing({"block_size": 2, "memory": 0}, ("xx...", "xx...", "..xx.", "..xx.", "....x")),
    "prefix": Drawing({**PAIRS, "num_prefix_tokens": 1}, ("xxxxx", "xxxx.", "xxxx.", "x.xxx", "x.xxx")),
    "prefix_causal": Drawing(
        {**PAIRS, "num_prefix_tokens": 1}, ("x....", "xx...", "xxx..", "x.xx.", "x.xxx"), is_causal=True
    ),
    "two_in_front": Drawing(
        {"block_size": 2, "memory": 0, "num_prefix_tokens": 2}, ("xxxxx", "xxxxx", "xxxx.", "xxxx.", "xx..x")
    ),
}
by_drawing = pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=DRAWINGS.keys())


@by_drawing
def test_the_rule_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    drawn = system_rules.image_1d(drawing.n, **drawing.fields, is_causal=drawing.is_causal)
    assert torch.equal(drawn, drawing.mask), drawn.int()


@by_drawing
def test_the_pattern_is_what_was_drawn_by_hand(drawing: Drawing) -> None:
    checks.check_drawing("image_1d", drawing)


@checks.both_ways
@pytest.mark.parametrize("num_prefix_tokens", [0, 1, 3])
@pytest.mark.parametrize(("block_size", "memory"), [(1, 0), (8, 3), (8, 8), (6, 20), (64, 16), (300, 5)])
def test_masks_equal_the_rule(block_size: int, memory: int, num_prefix_tokens: int, is_causal: bool) -> None:
    fields: dict[str, Any] = {
        "block_size": block_size,
        "memory": memory,
        "num_prefix_tokens": num_prefix_tokens,
    }
    pattern = hf_sparse.pattern("image_1d", **fields)
    for n in checks.lengths(min(block_size, 100) + num_prefix_tokens, longest=257):
        wanted = system_rules.image_1d(n, **fields, is_causal=is_causal)
        checks.check_table(pattern, wanted, n, heads=2, layer=1, is_causal=is_causal)


@checks.both_ways
def test_the_defaults_are_blocks_of_256_with_256_around(is_causal: bool) -> None:
    wanted = system_rules.image_1d(600, block_size=256, memory=256, is_causal=is_causal)
    checks.check_table(hf_sparse.pattern("image_1d"), wanted, 600, is_causal=is_causal)


def test_a_sequence_of_nothing_but_prefix_reads_everything() -> None:
    pattern = hf_sparse.pattern("image_1d", block_size=1, memory=0, num_prefix_tokens=4)
    for n in (1, 3, 4):
        assert pattern.mask(n).all()


def test_it_has_no_nodes_and_no_layer_differs() -> None:
    pattern = hf_sparse.pattern("image_1d", num_prefix_tokens=2)
    assert [pattern.num_nodes(n) for n in (1, 257)] == [0, 0]
    assert not pattern.varies_by_layer


def test_fields_and_defaults() -> None:
    checks.check_fields("image_1d", {"block_size": 256, "memory": 256, "num_prefix_tokens": 0})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("image_1d"))
    checks.check_round_trip(hf_sparse.pattern("image_1d", **PAIRS, num_prefix_tokens=2))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("image_1d", FIELDS)


@pytest.mark.parametrize(("field", "least"), [("block_size", 1), ("memory", 0), ("num_prefix_tokens", 0)])
def test_bad_counts_are_refused(field: str, least: int) -> None:
    checks.check_count_field("image_1d", field, least=least)
