"""Bias, bias by distance, softcap and sinks: served as their formulae say, and refused by name where they are not."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests.pattern_cases import CASES, HEADS, Case, Setting, attention, case_of, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import attend_by_rows, random_tensors

N, WIDTH, MOST = 33, 4, 6


def drawn(*shape: int) -> Tensor:
    """Return a drawn bias."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def sinks() -> Tensor:
    """Return a score of each head, of either sign."""
    return torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)


def of_every_pair(by_distance: Tensor, tokens: int) -> Tensor:
    """Return a bias by distance written out for every pair, float ``[1, H, tokens, tokens]``."""
    most = by_distance.shape[1] // 2
    rows = [[most + max(-most, min(most, key - query)) for key in range(tokens)] for query in range(tokens)]
    return by_distance[:, torch.tensor(rows)][None]


SETTINGS: dict[str, dict[str, Any]] = {
    "bias": {"bias": drawn(1, HEADS, N, N)},
    "distance_bias": {"distance_bias": drawn(HEADS, 2 * MOST + 1)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks()},
    "all": {
        "bias": drawn(1, HEADS, N, N),
        "distance_bias": drawn(HEADS, 2 * MOST + 1),
        "softcap": 0.7,
        "sinks": sinks(),
    },
}
# what "gather" serves as well
BLOCKWISE = {
    **{name: SETTINGS[name] for name in ("distance_bias", "softcap", "sinks")},
    "together": {name: value for name, value in SETTINGS["all"].items() if name != "bias"},
}


def as_the_oracle_takes_them(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with a bias by distance written out."""
    held = dict(settings)
    by_distance = held.pop("distance_bias", None)
    if by_distance is not None:
        written = of_every_pair(by_distance, N)
        held["bias"] = written if held.get("bias") is None else written + held["bias"]
    return held


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("case", sampled())
def test_scores_are_as_the_formula_says(case: Case, name: str) -> None:
    tensors = random_tensors(tokens=N, key_heads=2, width=WIDTH)
    mask = case.mask(Setting(N))[None]
    settings = as_the_oracle_takes_them(SETTINGS[name])
    wanted = with_gradients(functools.partial(attend_by_rows, mask=mask, **settings), tensors)
    attend = attention(case.pattern, backend="dense", return_lse=True)
    results = with_gradients(functools.partial(attend, **SETTINGS[name]), tensors)
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", sampled())
def test_blocks_give_what_a_mask_of_all_pairs_gives(case: Case, is_causal: bool, name: str) -> None:
    settings = {"is_causal": is_causal, "return_lse": True}
    tensors = random_tensors(batch=2, tokens=N, key_heads=2, width=WIDTH)
    is_real = torch.ones(2, N, dtype=torch.bool)
    is_real[1, :5] = is_real[1, 28:] = False
    for mask in (None, is_real):
        given = {**settings, **BLOCKWISE[name], "key_padding_mask": mask}
        wanted = with_gradients(attention(case.pattern, backend="dense", **given), tensors)
        results = with_gradients(attention(case.pattern, backend="gather", **given), tensors)
        for actual, oracle in zip(results, wanted, strict=True):
            assert_same_maths(actual, oracle, terms=N + WIDTH)


@pytest.mark.parametrize("name", ["bias", "all"])
def test_auto_serves_a_bias_of_every_pair_with_dense(name: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    auto, dense = (
        attention(CASES[0].pattern, backend=backend, **SETTINGS[name])(*tensors) for backend in ("auto", "dense")
    )
    assert torch.equal(auto, dense)


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize("pattern", [CASES[0].pattern, hf_sparse.pattern("band", radius=N)], ids=["narrow", "wide"])
def test_auto_serves_the_others_with_blocks(pattern: hf_sparse.Pattern, name: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    auto, gather = (attention(pattern, backend=backend, **BLOCKWISE[name])(*tensors) for backend in ("auto", "gather"))
    assert_same_maths(auto, gather, terms=N + WIDTH)


# tiles for many heads, runs of blocks, and blocks named by index
@pytest.mark.parametrize("case", ["band", "longformer_dilated_by_head", "bigbird_published"])
@pytest.mark.parametrize(
    ("name", "backend"),
    [("bias", "dense"), *((name, backend) for name in ("distance_bias", "sinks") for backend in ("dense", "gather"))],
)
def test_gradients_reach_what_is_added(name: str, backend: str, case: str) -> None:
    query, key, value = random_tensors(tokens=N, width=WIDTH)
    mask, given = case_of(case).mask(Setting(N))[None], SETTINGS[name][name]

    def by_rows(given: Tensor) -> Any:
        return attend_by_rows(query, key, value, mask, **as_the_oracle_takes_them({name: given}))

    def by_tiles(given: Tensor) -> Any:
        settings = {"return_lse": True, "backend": backend, name: given}
        return attention(case_of(case).pattern, **settings)(query, key, value)

    wanted, results = with_gradients(by_rows, [given]), with_gradients(by_tiles, [given])
    for actual, oracle in zip(results, wanted, strict=True):
        # all pairs add up in a single entry of a bias by distance
        assert_same_maths(actual, oracle, terms=N * N)
    assert results[-1].any()


@pytest.mark.parametrize("backend", ["dense", "gather"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_bias_by_distance_in_cached_decoding_is_that_of_one_pass(queries: int, backend: str) -> None:
    query, key, value = random_tensors(batch=2, tokens=N, width=WIDTH)
    is_real = torch.ones(2, N, dtype=torch.bool)
    is_real[1, :5] = False
    given = {"is_causal": True, "key_padding_mask": is_real, "backend": backend, **SETTINGS["distance_bias"]}
    attend = attention(CASES[0].pattern, **given)
    whole, last = attend(query, key, value), attend(query[:, :, -queries:], key, value)
    assert_same_maths(last, whole[:, :, -queries:], terms=N + WIDTH)


@pytest.mark.parametrize("shape", [(1, 1, N, N), (1, HEADS, 1, N), (2, 1, 1, N), (N,)])
def test_a_bias_is_broadcast(shape: tuple[int, ...]) -> None:
    tensors = random_tensors(batch=2, tokens=N, width=WIDTH)
    mask = CASES[0].mask(Setting(N))[None].expand(2, -1, -1, -1)
    full = drawn(*shape).expand(2, HEADS, N, N)
    out = attention(CASES[0].pattern, bias=drawn(*shape))(*tensors)
    assert_same_maths(out, attend_by_rows(*tensors, mask, bias=full)[0], terms=N + WIDTH)


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    pattern = hf_sparse.pattern("band", radius=0)
    hidden = torch.zeros(1, 1, 1, N, dtype=torch.float64)
    hidden[..., 5] = float("-inf")
    results = with_gradients(attention(pattern, bias=hidden), tensors)
    assert not results[0][:, :, 5].any()
    assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("name", ["bias", *BLOCKWISE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_all_is_computed_in_full(name: str, dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in random_tensors(tokens=N, width=WIDTH))
    mask = CASES[0].mask(Setting(N))[None]
    given = {
        key: value.to(dtype) if isinstance(value, Tensor) else value
        for key, value in {**SETTINGS, **BLOCKWISE}[name].items()
    }
    settings = as_the_oracle_takes_them(given)
    oracle, _ = attend_by_rows(
        query, key, value, mask, **{k: v.double() if isinstance(v, Tensor) else v for k, v in settings.items()}
    )
    scores = query.float() @ key.float().mT * WIDTH**-0.5
    if "softcap" in settings:
        scores = settings["softcap"] * (scores / settings["softcap"]).tanh()
    if "bias" in settings:
        scores = scores + settings["bias"].float()
    scores = scores.masked_fill(~mask, float("-inf"))
    if "sinks" in settings:
        column = settings["sinks"].float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    dense = (scores.softmax(-1)[..., :N] @ value.float()).to(dtype)
    out = attention(CASES[0].pattern, **given)(query, key, value)
    assert_within_rounding(out, oracle, dense)


def test_gather_refuses_a_bias_of_every_pair_by_name() -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    with pytest.raises(ValueError, match="backend 'gather' does not serve bias; pass backend='dense'"):
        attention(CASES[0].pattern, backend="gather", **SETTINGS["all"])(*tensors)


@pytest.mark.parametrize("backend", ["flex", "varlen"])
def test_fused_kernels_refuse_all_of_them_by_name(backend: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    names = "bias, distance_bias, softcap, sinks"
    with pytest.raises(ValueError, match=f"backend '{backend}' does not serve {names}; pass backend='auto'"):
        attention(CASES[0].pattern, backend=backend, **SETTINGS["all"])(*tensors)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"softcap": 0.0}, "softcap must be above 0, got 0.0"),
        (
            {"distance_bias": torch.zeros(HEADS, 4)},
            r"distance_bias must have shape \[heads, 2 \* M \+ 1\] with 4 heads",
        ),
        ({"distance_bias": torch.zeros(2, 5)}, r"distance_bias must have shape .* got \[2, 5\]"),
    ],
)
def test_what_is_no_term_of_a_score_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attention(CASES[0].pattern, **given)(*random_tensors(tokens=N, width=WIDTH))


@pytest.mark.parametrize("name", ["etc", "reformer", "bp_transformer"])
def test_patterns_that_serve_no_bias_by_distance_say_so(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' .* does not serve distance_bias"):
        attention(hf_sparse.pattern(name), **SETTINGS["distance_bias"])(*random_tensors(tokens=N, width=WIDTH))
