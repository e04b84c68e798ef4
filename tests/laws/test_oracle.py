"""Law 2: a backend equals the oracle, outputs and gradients, in float64 written with loops."""

import functools

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns import Pattern
from tests.pattern_cases import (
    BACKENDS,
    CASES,
    HEADS,
    NEVER_EMPTY,
    Case,
    Setting,
    attention,
    case_name,
    case_of,
    sampled,
)
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4


@functools.cache
def oracle(case: Case, n: int, is_causal: bool, has_lse: bool) -> list[Tensor]:
    """Return output, logsumexp if asked for, and gradients of the oracle on layer 1."""
    mask = case.mask(Setting(n, 1, is_causal))[None]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        out, lse = attend_by_rows(query, key, value, mask)
        return (out, lse) if has_lse else out

    return with_gradients(attend, random_tensors(tokens=n, key_heads=2, width=WIDTH))


def check(case: Case, n: int, is_causal: bool, backend: str, *, has_lse: bool) -> None:
    """Compare a backend with the oracle in everything that comes back."""
    attend = attention(case.pattern, is_causal=is_causal, layer=1, backend=backend, return_lse=has_lse)
    results = with_gradients(attend, random_tensors(tokens=n, key_heads=2, width=WIDTH))
    for actual, wanted in zip(results, oracle(case, n, is_causal, has_lse), strict=True):
        assert_same_maths(actual, wanted, terms=n + WIDTH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("n", [1, 7, 65])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_outputs_and_gradients_equal_the_loop_oracle(case: Case, n: int, is_causal: bool, backend: str) -> None:
    check(case, n, is_causal, backend, has_lse=False)


# 331 tokens are enough for runs of whole blocks that share a mask
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_runs_of_blocks_equal_the_loop_oracle(case: Case, backend: str) -> None:
    check(case, 331, False, backend, has_lse=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", sampled())
def test_causal_runs_of_blocks_equal_the_loop_oracle(case: Case, backend: str) -> None:
    check(case, 331, True, backend, has_lse=False)


@pytest.mark.parametrize("most", [1, 10_000])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_work_cut_into_small_calls_equals_the_loop_oracle(
    case: Case, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_sparse.backends.execute.CALL_SCORES", most)
    check(case, 331, False, "gather", has_lse=False)


@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
def test_runs_of_dilated_blocks_equal_the_dense_backend(is_causal: bool) -> None:
    pattern, tensors = hf_sparse.pattern("dilated", radius=10, dilation=2), random_tensors(tokens=900, width=WIDTH)
    results, wanted = (
        with_gradients(attention(pattern, is_causal=is_causal, backend=backend), tensors)
        for backend in ("gather", "dense")
    )
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=900 + WIDTH)


def test_a_short_sequence_in_one_call_gives_rows_without_keys_no_logsumexp() -> None:
    # the summaries alone, of which the first tokens see none
    pattern = hf_sparse.pattern("sparse_transformer", stride=16, summary=2, heads="interleaved")
    settings = {"layer": 1, "is_causal": True, "return_lse": True}
    tensors = random_tensors(tokens=60, width=WIDTH)
    out, lse = hf_sparse.sparse_attention(*tensors, pattern, backend="auto", **settings)
    wanted_out, wanted = hf_sparse.sparse_attention(*tensors, pattern, backend="dense", **settings)
    assert bool((wanted == float("-inf")).any())
    assert torch.equal(lse == float("-inf"), wanted == float("-inf"))
    assert_same_maths(out, wanted_out, terms=60 + WIDTH)
    assert_same_maths(lse.nan_to_num(neginf=0.0), wanted.nan_to_num(neginf=0.0), terms=60 + WIDTH)


# a few rows of a batch at a time, in tiles that do not come out even
@pytest.mark.parametrize("case", sampled())
def test_rows_of_a_batch_run_a_few_at_a_time(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(batch=7, tokens=20, width=WIDTH)
    wanted = with_gradients(attention(case.pattern, layer=1, backend="dense"), tensors)
    monkeypatch.setattr("hf_sparse.backends.execute.CALL_SCORES", 2 * HEADS * 20 * 20)
    results = with_gradients(attention(case.pattern, layer=1, backend="gather"), tensors)
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=20 + WIDTH)


@pytest.mark.parametrize("layer", [4, 11])
@pytest.mark.parametrize("name", ["bigbird_published", "random"])
def test_deep_layers_have_plans_of_their_own(name: str, layer: int) -> None:
    pattern, tensors = case_of(name).pattern, random_tensors(tokens=129, width=WIDTH)
    found = {
        (backend, at): hf_sparse.sparse_attention(*tensors, pattern, layer=at, backend=backend)
        for backend in ("dense", "gather")
        for at in (0, layer)
    }
    assert_same_maths(found["gather", layer], found["dense", layer], terms=129 + WIDTH)
    assert not torch.allclose(found["gather", 0], found["gather", layer])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("case", sampled())
def test_gradients_flow_through_the_logsumexp(case: Case, is_causal: bool, backend: str) -> None:
    check(case, 65, is_causal, backend, has_lse=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("n", [1, 2, 8, 9, 15, 16, 17, 63, 64, 127, 129, 331])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_length_equals_the_loop_oracle(case: Case, n: int, is_causal: bool, backend: str) -> None:
    check(case, n, is_causal, backend, has_lse=True)


@pytest.mark.parametrize("case", NEVER_EMPTY, ids=case_name)
def test_numerical_gradients_agree(case: Case) -> None:
    attend = attention(case.pattern, backend="gather", return_lse=True)
    leaves = [tensor.requires_grad_() for tensor in random_tensors(tokens=9, width=2, key_heads=2)]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize(
    "pattern", [hf_sparse.pattern("random", num_random_blocks=0), hf_sparse.pattern("global", positions=())], ids=str
)
def test_a_pattern_without_edges_gives_zeros(pattern: Pattern, is_causal: bool, backend: str) -> None:
    attend = attention(pattern, is_causal=is_causal, backend=backend, return_lse=True)
    out, lse, *gradients = with_gradients(attend, random_tensors(tokens=9, width=WIDTH))
    assert lse.eq(float("-inf")).all()
    assert not any(result.any() for result in (out, *gradients))
