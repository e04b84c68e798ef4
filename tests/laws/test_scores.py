"""Bias, softcap and sinks: served by the dense backend as their formulae say, refused by name elsewhere."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests.pattern_cases import CASES, HEADS, Case, Setting, attention, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.softmax import attend_by_rows, random_tensors

N, WIDTH = 33, 4


def bias(*shape: int) -> Tensor:
    """Return a drawn bias."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def sinks() -> Tensor:
    """Return a score of each head, of either sign."""
    return torch.tensor([0.5, -2.0, 3.0, 0.0], dtype=torch.float64)


SETTINGS: dict[str, dict[str, Any]] = {
    "bias": {"bias": bias(1, HEADS, N, N)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks()},
    "all": {"bias": bias(1, HEADS, N, N), "softcap": 0.7, "sinks": sinks()},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("case", sampled())
def test_scores_are_as_the_formula_says(case: Case, name: str) -> None:
    tensors = random_tensors(tokens=N, key_heads=2, width=WIDTH)
    mask = case.mask(Setting(N))[None]
    wanted = with_gradients(functools.partial(attend_by_rows, mask=mask, **SETTINGS[name]), tensors)
    attend = attention(case.pattern, backend="dense", return_lse=True)
    results = with_gradients(functools.partial(attend, **SETTINGS[name]), tensors)
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)


@pytest.mark.parametrize("name", SETTINGS)
def test_auto_serves_them_with_dense(name: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    auto, dense = (
        attention(CASES[0].pattern, backend=backend, **SETTINGS[name])(*tensors) for backend in ("auto", "dense")
    )
    assert torch.equal(auto, dense)


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_gradients_reach_bias_and_sinks(name: str) -> None:
    query, key, value = random_tensors(tokens=N, width=WIDTH)
    mask = CASES[0].mask(Setting(N))[None]
    given = SETTINGS[name][name]
    wanted = with_gradients(lambda given: attend_by_rows(query, key, value, mask, **{name: given}), [given])
    attend = functools.partial(attention(CASES[0].pattern, return_lse=True), query, key, value)
    results = with_gradients(lambda given: attend(**{name: given}), [given])
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)
    assert results[-1].any()


@pytest.mark.parametrize("shape", [(1, 1, N, N), (1, HEADS, 1, N), (2, 1, 1, N), (N,)])
def test_a_bias_is_broadcast(shape: tuple[int, ...]) -> None:
    tensors = random_tensors(batch=2, tokens=N, width=WIDTH)
    mask = CASES[0].mask(Setting(N))[None].expand(2, -1, -1, -1)
    full = bias(*shape).expand(2, HEADS, N, N)
    out = attention(CASES[0].pattern, bias=bias(*shape))(*tensors)
    assert_same_maths(out, attend_by_rows(*tensors, mask, bias=full)[0], terms=N + WIDTH)


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    pattern = hf_sparse.pattern("band", radius=0)
    hidden = torch.zeros(1, 1, 1, N, dtype=torch.float64)
    hidden[..., 5] = float("-inf")
    results = with_gradients(attention(pattern, bias=hidden), tensors)
    assert not results[0][:, :, 5].any()
    assert not any(result.isnan().any() for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_in_half_precision_is_added_in_full(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in random_tensors(tokens=N, width=WIDTH))
    mask, given = CASES[0].mask(Setting(N))[None], bias(1, HEADS, N, N).to(dtype)
    oracle, _ = attend_by_rows(query, key, value, mask, bias=given.double())
    scores = (query.float() @ key.float().mT * WIDTH**-0.5 + given.float()).masked_fill(~mask, float("-inf"))
    dense = (scores.softmax(-1) @ value.float()).to(dtype)
    out = attention(CASES[0].pattern, bias=given)(query, key, value)
    assert_within_rounding(out, oracle, dense)


@pytest.mark.parametrize("name", ["bias", "softcap", "sinks"])
def test_gather_refuses_what_it_does_not_serve_by_name(name: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    with pytest.raises(ValueError, match=f"backend 'gather' does not serve {name}; pass backend='dense'"):
        attention(CASES[0].pattern, backend="gather", **SETTINGS[name])(*tensors)


def test_gather_names_all_that_it_does_not_serve() -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    with pytest.raises(ValueError, match="backend 'gather' does not serve bias, softcap, sinks"):
        attention(CASES[0].pattern, backend="gather", **SETTINGS["all"])(*tensors)
