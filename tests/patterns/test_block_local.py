"""Block-local: every token reads its own block."""

import pytest

import hf_sparse
from tests.patterns import checks
from tests.support import rules


def test_blocks_of_two_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("block_local", block_size=2)
    checks.check_drawn_by_hand(pattern, "xx...", "xx...", "..xx.", "..xx.", "....x")
    checks.check_drawn_by_hand(pattern, "x....", "xx...", "..x..", "..xx.", "....x", is_causal=True)


@checks.both_ways
@pytest.mark.parametrize("block", [1, 4, 64, 100])
def test_masks_equal_the_rule(block: int, is_causal: bool) -> None:
    for n in sorted({*checks.lengths(4), *checks.lengths(64)}):
        pattern = hf_sparse.pattern("block_local", block_size=block)
        checks.check_mask(pattern, rules.block_local(block), n, is_causal=is_causal)


def test_fields_and_defaults() -> None:
    checks.check_fields("block_local", {"block_size": 256})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("block_local", block_size=3))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("block_local", "block_size")


def test_a_bad_block_is_refused() -> None:
    checks.check_count_field("block_local", "block_size", least=1)


def test_a_block_larger_than_the_model_is_refused() -> None:
    checks.check_fits_model(hf_sparse.pattern("block_local", block_size=16), 16)
