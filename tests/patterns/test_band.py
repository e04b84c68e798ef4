"""Band: every token reads the tokens at most ``radius`` away."""

import pytest

import hf_sparse
from tests.patterns import checks
from tests.support import rules


def test_radius_one_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("band", radius=1)
    checks.check_drawn_by_hand(pattern, "xx...", "xxx..", ".xxx.", "..xxx", "...xx")
    checks.check_drawn_by_hand(pattern, "x....", "xx...", ".xx..", "..xx.", "...xx", is_causal=True)


def test_radius_zero_reads_the_token_itself() -> None:
    checks.check_drawn_by_hand(hf_sparse.pattern("band", radius=0), "x..", ".x.", "..x")


@checks.both_ways
@pytest.mark.parametrize("radius", [0, 1, 5, 64, 100])
def test_masks_equal_the_rule(radius: int, is_causal: bool) -> None:
    for n in checks.lengths(5):
        pattern = hf_sparse.pattern("band", radius=radius)
        checks.check_mask(pattern, rules.band(radius), n, is_causal=is_causal)


def test_an_inner_token_reads_two_radii_and_itself() -> None:
    assert hf_sparse.pattern("band", radius=4).mask(20)[0, 10].sum() == 9
    assert hf_sparse.pattern("band", radius=4).mask(20, is_causal=True)[0, 10].sum() == 5


def test_fields_and_defaults() -> None:
    checks.check_fields("band", {"radius": 256})


def test_it_survives_json() -> None:
    checks.check_round_trip(hf_sparse.pattern("band", radius=3))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("band", "radius")


def test_a_bad_radius_is_refused() -> None:
    checks.check_count_field("band", "radius", least=0)


def test_it_has_neither_global_tokens_nor_weights_nor_layers() -> None:
    pattern = hf_sparse.pattern("band")
    assert (pattern.has_global_tokens, pattern.reads_padding, pattern.varies_by_layer) == (False, False, False)
    assert pattern.make_state(hidden_size=8, num_heads=2, num_key_value_heads=2, head_dim=4) is None
