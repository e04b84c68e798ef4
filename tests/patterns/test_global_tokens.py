"""Global tokens: read by all and reading all."""

import pytest

import hf_sparse
from tests.patterns import checks
from tests.support import rules


def test_one_token_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("global", positions=(1,))
    checks.check_drawn_by_hand(pattern, ".x..", "xxxx", ".x..", ".x..")
    checks.check_drawn_by_hand(pattern, "....", "xx..", ".x..", ".x..", is_causal=True)


@checks.both_ways
@pytest.mark.parametrize("positions", [(), (0,), (0, 6, 7, 64), (3, 200), tuple(range(65))])
def test_masks_equal_the_rule(positions: tuple[int, ...], is_causal: bool) -> None:
    for n in checks.lengths(7):
        pattern = hf_sparse.pattern("global", positions=positions)
        checks.check_mask(pattern, rules.global_tokens(positions), n, is_causal=is_causal)


def test_fields_and_defaults() -> None:
    checks.check_fields("global", {"positions": [0]})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("global", positions=(3, 5)))


def test_positions_are_a_set_in_order() -> None:
    pattern = hf_sparse.pattern("global", positions=[5, 0, 5])
    assert pattern == hf_sparse.pattern("global", positions=(0, 5))
    assert pattern.to_dict() == {"key": "global", "positions": [0, 5]}


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("global", "positions")


@pytest.mark.parametrize("positions", [3, "03", None])
def test_what_is_no_sequence_of_positions_is_refused(positions: object) -> None:
    with pytest.raises(TypeError, match=r"positions must be a sequence of positions such as \(0,\), got"):
        hf_sparse.pattern("global", positions=positions)


def test_bad_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="each of positions must be at least 0, got -1"):
        hf_sparse.pattern("global", positions=(0, -1))
    with pytest.raises(TypeError, match=r"each of positions must be a whole number, got 1\.0"):
        hf_sparse.pattern("global", positions=(1.0,))


def test_a_global_mask_means_something_to_it() -> None:
    assert hf_sparse.pattern("global").has_global_tokens
