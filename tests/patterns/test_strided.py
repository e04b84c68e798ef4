"""Strided: every token reads each ``stride``-th token."""

import pytest

import hf_sparse
from tests.patterns import checks
from tests.support import rules


def test_stride_three_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("strided", stride=3)
    checks.check_drawn_by_hand(pattern, "x..x..", ".x..x.", "..x..x", "x..x..", ".x..x.", "..x..x")
    checks.check_drawn_by_hand(pattern, "x...", ".x..", "..x.", "x..x", is_causal=True)


@checks.both_ways
@pytest.mark.parametrize("stride", [1, 2, 5, 64, 100])
def test_masks_equal_the_rule(stride: int, is_causal: bool) -> None:
    for n in checks.lengths(5):
        checks.check_mask(hf_sparse.pattern("strided", stride=stride), rules.strided(stride), n, is_causal=is_causal)


def test_stride_one_is_dense() -> None:
    assert hf_sparse.pattern("strided", stride=1).mask(20).all()


def test_fields_and_defaults() -> None:
    checks.check_fields("strided", {"stride": 128})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("strided", stride=3))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("strided", "stride")


def test_a_bad_stride_is_refused() -> None:
    checks.check_count_field("strided", "stride", least=1)
