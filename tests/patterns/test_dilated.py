"""Dilated: ``radius`` keys to each side, ``dilation`` apart."""

import pytest

import hf_sparse
from tests.patterns import checks
from tests.support import rules


def test_every_other_key_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("dilated", radius=1, dilation=2)
    checks.check_drawn_by_hand(pattern, "x.x...", ".x.x..", "x.x.x.", ".x.x.x", "..x.x.", "...x.x")
    checks.check_drawn_by_hand(pattern, "x....", ".x...", "x.x..", ".x.x.", "..x.x", is_causal=True)


@checks.both_ways
@pytest.mark.parametrize(("radius", "dilation"), [(0, 3), (2, 1), (2, 3), (1, 8), (20, 4), (3, 100)])
def test_masks_equal_the_rule(radius: int, dilation: int, is_causal: bool) -> None:
    for n in checks.lengths(3):
        pattern = hf_sparse.pattern("dilated", radius=radius, dilation=dilation)
        checks.check_mask(pattern, rules.dilated(radius, dilation), n, is_causal=is_causal)


def test_an_inner_token_reads_two_radii_and_itself() -> None:
    pattern = hf_sparse.pattern("dilated", radius=3, dilation=4)
    assert pattern.mask(40)[0, 20].nonzero()[:, 0].tolist() == [8, 12, 16, 20, 24, 28, 32]


def test_dilation_one_is_a_band() -> None:
    dilated, band = hf_sparse.pattern("dilated", radius=3, dilation=1), hf_sparse.pattern("band", radius=3)
    assert dilated.mask(20).equal(band.mask(20))


def test_fields_and_defaults() -> None:
    checks.check_fields("dilated", {"radius": 256, "dilation": 2})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("dilated", radius=3, dilation=5))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("dilated", "radius, dilation")


@pytest.mark.parametrize(("field", "least"), [("radius", 0), ("dilation", 1)])
def test_bad_values_are_refused(field: str, least: int) -> None:
    checks.check_count_field("dilated", field, least=least)
