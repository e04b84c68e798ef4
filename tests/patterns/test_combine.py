"""Patterns made of patterns: unions, different patterns on different heads, and the dicts they all come from."""

from pathlib import Path

import pytest
import torch

import hf_sparse
from hf_sparse.patterns import ByHead, Pattern, Union
from tests.patterns import checks
from tests.support import rules

BAND = hf_sparse.pattern("band", radius=1)
STRIDED = hf_sparse.pattern("strided", stride=3)
GLOBAL = hf_sparse.pattern("global", positions=(4,))
BLOCK = hf_sparse.pattern("block_local", block_size=4)
PADDED = hf_sparse.pattern("bigbird", length="padded")


def test_a_union_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("band", radius=0) | hf_sparse.pattern("global", positions=(1,))
    checks.check_drawn_by_hand(pattern, "xx..", "xxxx", ".xx.", ".x.x")
    checks.check_drawn_by_hand(pattern, "x...", "xx..", ".xx.", ".x.x", is_causal=True)


def test_patterns_by_head_drawn_by_hand() -> None:
    drawn = hf_sparse.by_head({0: BAND, 1: hf_sparse.pattern("strided", stride=2)}).mask(4, heads=2)
    assert torch.equal(drawn[:1], rules.from_rows("xx..", "xxx.", ".xxx", "..xx"))
    assert torch.equal(drawn[1:], rules.from_rows("x.x.", ".x.x", "x.x.", ".x.x"))


@checks.both_ways
def test_masks_of_unions_equal_the_rule(is_causal: bool) -> None:
    for n in checks.lengths(4):
        rule = rules.union(rules.band(1), rules.strided(3), rules.global_tokens((4,)), rules.block_local(4))
        checks.check_mask(BAND | STRIDED | GLOBAL | BLOCK, rule, n, heads=2, is_causal=is_causal)
        checks.check_mask(BLOCK | GLOBAL | STRIDED | BAND, rule, n, heads=2, is_causal=is_causal)


@checks.both_ways
def test_masks_by_head_equal_the_rule(is_causal: bool) -> None:
    for n in checks.lengths(4):
        pattern = hf_sparse.by_head({range(2): BAND | GLOBAL, (3,): BLOCK, 2: STRIDED})
        either = rules.union(rules.band(1), rules.global_tokens((4,)))
        rule = rules.by_head({0: either, 1: either, 2: rules.strided(3), 3: rules.block_local(4)})
        checks.check_mask(pattern, rule, n, heads=4, is_causal=is_causal)


@checks.both_ways
def test_combinations_nest(is_causal: bool) -> None:
    inner = hf_sparse.by_head({0: BAND, 1: STRIDED})
    outer = hf_sparse.by_head({0: inner | GLOBAL, 1: inner | BLOCK})
    rule = rules.by_head(
        {
            0: rules.union(rules.band(1), rules.global_tokens((4,))),
            1: rules.union(rules.strided(3), rules.block_local(4)),
        }
    )
    checks.check_mask(outer, rule, 33, heads=2, is_causal=is_causal)


def test_a_union_with_itself_is_itself() -> None:
    assert (BAND | BAND).density(20) == BAND.density(20)
    assert torch.equal((BAND | BAND).mask(20), BAND.mask(20))


def test_unions_of_unions_are_flat() -> None:
    assert (BAND | STRIDED) | GLOBAL == BAND | (STRIDED | GLOBAL) == Union((BAND, STRIDED, GLOBAL))


def test_dicts_of_combinations() -> None:
    assert (BAND | STRIDED).to_dict() == {
        "key": "union",
        "patterns": [{"key": "band", "radius": 1}, {"key": "strided", "stride": 3}],
    }
    assert hf_sparse.by_head({range(0, 4, 2): BAND, (1, 3): STRIDED}).to_dict() == {
        "key": "by_head",
        "heads": [[0, 2], [1, 3]],
        "patterns": [{"key": "band", "radius": 1}, {"key": "strided", "stride": 3}],
    }


@pytest.mark.parametrize(
    "pattern",
    [
        BAND | GLOBAL,
        hf_sparse.by_head({0: BAND | GLOBAL, range(1, 3): STRIDED}),
        hf_sparse.by_head({0: BAND, 1: STRIDED}) | hf_sparse.pattern("longformer", window=(2, 4), dilation=(1, 2)),
    ],
)
def test_they_survive_json(pattern: Pattern) -> None:
    checks.check_round_trip(pattern)


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unsupported operand type\(s\) for \|"):
        BAND | 3  # type: ignore[operator]
    with pytest.raises(TypeError, match="a union is made of patterns, got 3"):
        Union((BAND, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="by_head maps heads to patterns, got 'band'"):
        hf_sparse.by_head({0: "band"})  # type: ignore[dict-item]


def test_an_empty_union_is_refused() -> None:
    with pytest.raises(ValueError, match="a union needs at least one pattern"):
        Union(())


@pytest.mark.parametrize("heads", [((0, 1), (1,)), ((0,), (2,)), ((1,), (2,)), ((), ())])
def test_each_head_is_named_exactly_once(heads: tuple[tuple[int, ...], ...]) -> None:
    named = sorted(head for group in heads for head in group)
    message = "by_head must name each head from 0 on exactly once, got heads " + str(named).replace("[", r"\[")
    with pytest.raises(ValueError, match=message):
        ByHead(heads, (BAND, STRIDED))


def test_each_member_has_heads() -> None:
    with pytest.raises(ValueError, match="by_head must name each head from 0 on exactly once"):
        ByHead(((0,), (1,)), (BAND,))


def test_bad_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="a head must be at least 0, got -1"):
        hf_sparse.by_head({0: BAND, -1: STRIDED})
    with pytest.raises(TypeError, match=r"a head must be a whole number, got 1\.0"):
        ByHead(((0,), (1.0,)), (BAND, STRIDED))  # type: ignore[arg-type]


def test_real_and_padded_lengths_do_not_combine() -> None:
    message = "patterns laid over the real and over the padded length cannot be combined"
    with pytest.raises(ValueError, match=message):
        BAND | PADDED
    with pytest.raises(ValueError, match=message):
        hf_sparse.by_head({0: BAND, 1: PADDED})
    assert (PADDED | PADDED).reads_padding


def test_by_head_has_to_fit_the_heads_of_the_model() -> None:
    pattern = hf_sparse.by_head({0: BAND, 1: STRIDED})
    pattern.check(num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="by_head names 2 heads, but the model has 3"):
        pattern.check(num_layers=1, num_heads=3)


def test_members_have_to_fit_the_model() -> None:
    layers = hf_sparse.pattern("longformer", window=(2, 4))
    for pattern in (BAND | layers, hf_sparse.by_head({0: BAND, 1: layers})):
        with pytest.raises(ValueError, match="window has 2 entries, one a layer, but the model has 3"):
            pattern.check(num_layers=3, num_heads=2)
        with pytest.raises(ValueError, match="block_size 4 is larger than the model's maximum length 3"):
            (pattern | BLOCK).check(num_layers=2, num_heads=2, length=3)


@pytest.mark.parametrize("combine", [lambda p, q: p | q, lambda p, q: hf_sparse.by_head({0: p, 1: q})])
def test_what_one_member_has_all_have(combine: checks.Combine) -> None:
    random, layers = hf_sparse.pattern("random"), hf_sparse.pattern("longformer", window=(2, 4))
    assert combine(BAND, GLOBAL).has_global_tokens
    assert not combine(BAND, STRIDED).has_global_tokens
    assert combine(BAND, random).varies_by_layer
    assert combine(BAND, layers).varies_by_layer
    assert not combine(BAND, STRIDED).varies_by_layer


@pytest.mark.parametrize("combine", [lambda p, q: p | q, lambda p, q: hf_sparse.by_head({0: p, 1: q})])
def test_at_most_one_member_owns_weights(combine: checks.Combine) -> None:
    sizes = {"hidden_size": 8, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    longformer = hf_sparse.pattern("longformer")
    assert combine(BAND, STRIDED).make_state(**sizes) is None
    assert isinstance(combine(BAND, longformer).make_state(**sizes), torch.nn.Module)
    with pytest.raises(
        ValueError, match=r"at most one member .* set global_projections=False, .* or .*=0 on the others"
    ):
        combine(longformer, longformer).make_state(**sizes)


def test_an_unknown_key_is_refused_with_the_known_ones() -> None:
    message = f"unknown pattern 'bnad'; known: {', '.join(sorted(hf_sparse.PATTERNS))}"
    for make in (hf_sparse.pattern, lambda key: hf_sparse.pattern_from_dict({"key": key})):
        with pytest.raises(ValueError, match=message):
            make("bnad")
    with pytest.raises(ValueError, match=message):
        hf_sparse.pattern_from_dict({"key": "union", "patterns": [{"key": "bnad"}]})


@pytest.mark.parametrize("description", ["band", None, [], {"radius": 3}])
def test_what_is_no_description_is_refused(description: object) -> None:
    with pytest.raises(TypeError, match="a pattern is described by a dict with a 'key', got"):
        hf_sparse.pattern_from_dict(description)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["union", "by_head"])
def test_a_combination_without_members_is_refused(key: str) -> None:
    for patterns in ({}, {"patterns": None}, {"patterns": "band"}):
        with pytest.raises(ValueError, match=f"a {key} lists its members under 'patterns', got"):
            hf_sparse.pattern_from_dict({"key": key, **patterns})
    with pytest.raises(ValueError, match=f"pattern '{key}' has no field 'members'; known: "):
        hf_sparse.pattern_from_dict({"key": key, "patterns": [{"key": "band"}], "members": []})


def test_patterns_are_registered_under_their_keys() -> None:
    atoms = {"band", "dilated", "strided", "block_local", "global", "random"}
    assert atoms | {"longformer", "bigbird"} <= set(hf_sparse.PATTERNS)
    for key, cls in hf_sparse.PATTERNS.items():
        assert cls.key == key
        assert cls() == hf_sparse.pattern(key) == hf_sparse.pattern_from_dict({"key": key})


def test_every_registered_pattern_has_a_test_file_named_as_its_module() -> None:
    here = Path(__file__).parent
    for cls in hf_sparse.PATTERNS.values():
        assert (here / f"test_{cls.__module__.rpartition('.')[2]}.py").exists()


def test_patterns_cannot_be_changed() -> None:
    for cls in hf_sparse.PATTERNS.values():
        pattern = cls()
        field = list(pattern.to_dict())[1]
        with pytest.raises(AttributeError, match="cannot assign to field"):
            setattr(pattern, field, 1)
