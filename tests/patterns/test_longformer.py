"""Longformer: half a window to each side, and global tokens; a window for each layer, a dilation for each head."""

import pytest
import torch

import hf_sparse
from tests.patterns import checks
from tests.support import rules

GLOBALS = (0, 7, 30)


def test_a_window_of_two_and_a_global_token_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("longformer", window=2, global_tokens=(0,))
    checks.check_drawn_by_hand(pattern, "xxxxx", "xxx..", "xxxx.", "x.xxx", "x..xx")
    checks.check_drawn_by_hand(pattern, "x....", "xx...", "xxx..", "x.xx.", "x..xx", is_causal=True)


def test_a_dilated_window_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("longformer", window=2, dilation=2)
    checks.check_drawn_by_hand(pattern, "x.x..", ".x.x.", "x.x.x", ".x.x.", "..x.x")
    checks.check_drawn_by_hand(pattern, "x....", ".x...", "x.x..", ".x.x.", "..x.x", is_causal=True)


def test_windows_by_layer_drawn_by_hand() -> None:
    pattern = hf_sparse.pattern("longformer", window=(2, 4))
    checks.check_drawn_by_hand(pattern, "xx..", "xxx.", ".xxx", "..xx", layer=0)
    checks.check_drawn_by_hand(pattern, "xxx.", "xxxx", "xxxx", ".xxx", layer=1)


def test_dilations_by_head_drawn_by_hand() -> None:
    drawn = hf_sparse.pattern("longformer", window=2, dilation=(1, 2)).mask(4, heads=2)
    assert torch.equal(drawn[:1], rules.from_rows("xx..", "xxx.", ".xxx", "..xx"))
    assert torch.equal(drawn[1:], rules.from_rows("x.x.", ".x.x", "x.x.", ".x.x"))


@checks.both_ways
@pytest.mark.parametrize(("window", "dilation"), [(2, 1), (8, 1), (6, 3), (200, 1), (4, 50)])
@pytest.mark.parametrize("globals_", [(), GLOBALS])
def test_masks_equal_the_rule(globals_: tuple[int, ...], window: int, dilation: int, is_causal: bool) -> None:
    for n in checks.lengths(8):
        pattern = hf_sparse.pattern("longformer", window=window, global_tokens=globals_, dilation=dilation)
        checks.check_mask(pattern, rules.longformer(window, globals_, dilation=dilation), n, is_causal=is_causal)


@checks.both_ways
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_layers_and_heads_have_windows_and_dilations_of_their_own(layer: int, is_causal: bool) -> None:
    for n in [1, 7, 65]:
        windows, dilations = (2, 8, 6), (1, 4, 2, 1)
        pattern = hf_sparse.pattern("longformer", window=windows, global_tokens=GLOBALS, dilation=dilations)
        rule = rules.longformer(windows, GLOBALS, dilation=dilations, layer=layer)
        checks.check_mask(pattern, rule, n, heads=4, layer=layer, is_causal=is_causal)


def test_upper_layers_dilate_some_heads() -> None:
    # as the paper's character model: none below, two heads of each upper layer
    pattern = hf_sparse.pattern("longformer", window=(2, 4), dilation=(1, (1, 1, 2, 3)))
    assert pattern.varies_by_layer
    lower, upper = (pattern.mask(20, heads=4, layer=layer) for layer in range(2))
    assert all(torch.equal(head, rules.draw(rules.longformer(2, ()), 20)[0]) for head in lower)
    assert torch.equal(upper, rules.draw(rules.longformer(4, (), dilation=(1, 1, 2, 3)), 20, heads=4))
    checks.check_round_trip(pattern)
    pattern.check(num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="dilation has 2 entries, one a layer, but the model has 3"):
        hf_sparse.pattern("longformer", dilation=(1, (1, 2))).check(num_layers=3, num_heads=2)
    with pytest.raises(ValueError, match="dilation has 2 entries, one a head, but the model has 4"):
        hf_sparse.pattern("longformer", dilation=(1, (1, 2))).check(num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        hf_sparse.pattern("longformer", dilation=(1, (1, 0)))


def test_an_inner_token_reads_its_window_and_itself() -> None:
    for dilation in (1, 2):
        assert hf_sparse.pattern("longformer", window=8, dilation=dilation).mask(40)[0, 20].sum() == 9


def test_fields_and_defaults() -> None:
    defaults = {"window": 512, "global_tokens": [], "dilation": 1, "global_projections": True}
    checks.check_fields("longformer", defaults)


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 4},
        {"window": (4, 8), "dilation": (1, 2, 3), "global_tokens": (0, 5), "global_projections": False},
    ],
)
def test_it_survives_json(fields: dict[str, object]) -> None:
    checks.check_round_trip(hf_sparse.pattern("longformer", **fields))


def test_lists_and_tuples_are_the_same() -> None:
    lists = hf_sparse.pattern("longformer", window=[4, 8], dilation=[1, 2], global_tokens=[9, 0])
    assert lists == hf_sparse.pattern("longformer", window=(4, 8), dilation=(1, 2), global_tokens=(0, 9))


def test_an_unknown_field_is_refused_with_the_known_ones() -> None:
    checks.check_unknown_field("longformer", "window, global_tokens, dilation, global_projections")


@pytest.mark.parametrize("window", [5, (4, 5), [5]])
def test_an_odd_window_is_refused_with_the_way_out(window: object) -> None:
    with pytest.raises(ValueError, match=r"window must be even \(half to each side\), got 5; try 6"):
        hf_sparse.pattern("longformer", window=window)


@pytest.mark.parametrize("window", [0, 1, -4, (4, 0)])
def test_a_window_below_two_is_refused(window: object) -> None:
    bad = window[1] if isinstance(window, tuple) else window
    with pytest.raises(ValueError, match=f"window must be at least 2, got {bad}"):
        hf_sparse.pattern("longformer", window=window)


@pytest.mark.parametrize("dilation", [0, -1, (1, 0)])
def test_a_dilation_below_one_is_refused(dilation: object) -> None:
    with pytest.raises(ValueError, match="dilation must be at least 1, got"):
        hf_sparse.pattern("longformer", dilation=dilation)


@pytest.mark.parametrize("field", ["window", "dilation"])
def test_no_number_at_all_and_wrong_kinds_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be one number or a number for each, got none"):
        hf_sparse.pattern("longformer", **{field: ()})
    for wrong in (4.0, "4", None, True, (4.0,)):
        with pytest.raises(TypeError, match=f"{field} must be a whole number, got"):
            hf_sparse.pattern("longformer", **{field: wrong})


def test_bad_global_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="each of global_tokens must be at least 0, got -1"):
        hf_sparse.pattern("longformer", global_tokens=(-1,))
    with pytest.raises(TypeError, match=r"global_tokens must be a sequence of positions such as \(0,\), got 0"):
        hf_sparse.pattern("longformer", global_tokens=0)


def test_global_projections_are_on_or_off() -> None:
    with pytest.raises(TypeError, match="global_projections must be true or false, got 1"):
        hf_sparse.pattern("longformer", global_projections=1)


def test_windows_and_dilations_have_to_fit_the_model() -> None:
    pattern = hf_sparse.pattern("longformer", window=(4, 8), dilation=(1, 2, 1))
    pattern.check(num_layers=2, num_heads=3)
    with pytest.raises(ValueError, match="window has 2 entries, one a layer, but the model has 3"):
        pattern.check(num_layers=3, num_heads=3)
    with pytest.raises(ValueError, match="dilation has 3 entries, one a head, but the model has 4"):
        pattern.check(num_layers=2, num_heads=4)
    hf_sparse.pattern("longformer").check(num_layers=7, num_heads=5, length=16)


def test_only_windows_by_layer_vary_by_layer() -> None:
    assert hf_sparse.pattern("longformer", window=(4, 4)).varies_by_layer
    assert not hf_sparse.pattern("longformer", dilation=(1, 2)).varies_by_layer
    assert hf_sparse.pattern("longformer").has_global_tokens


def test_its_weights_are_three_projections_of_the_size_of_the_layer() -> None:
    sizes = {"hidden_size": 12, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 5}
    state = hf_sparse.pattern("longformer").make_state(**sizes)
    assert state is not None
    shapes = {name: tuple(weight.shape) for name, weight in state.named_parameters()}
    assert shapes == {
        "query.weight": (20, 12),
        "query.bias": (20,),
        "key.weight": (10, 12),
        "key.bias": (10,),
        "value.weight": (10, 12),
        "value.bias": (10,),
    }
    query, key, value = state(torch.randn(3, 7, 12))
    assert (query.shape, key.shape, value.shape) == ((3, 4, 7, 5), (3, 2, 7, 5), (3, 2, 7, 5))
    assert hf_sparse.pattern("longformer", global_projections=False).make_state(**sizes) is None
