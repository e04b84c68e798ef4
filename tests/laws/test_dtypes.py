"""Every backend computes in float32, bfloat16 and float16 as well as dense torch does."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.pattern_cases import BACKENDS, NEVER_EMPTY, Case, Setting, attention, case_name, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_within_rounding
from tests.support.softmax import attend_by_rows, random_tensors

N, WIDTH = 65, 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rounded(dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value as the dtype holds them."""
    return [tensor.to(dtype) for tensor in random_tensors(tokens=N, width=WIDTH)]


@functools.cache
def oracle(case: Case, dtype: torch.dtype, is_causal: bool) -> list[Tensor]:
    """Return output and gradients in float64 of the rounded inputs."""
    mask = case.mask(Setting(N, 0, is_causal))[None]
    tensors = [tensor.double() for tensor in rounded(dtype)]
    return with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask)[0], tensors)


@functools.cache
def dense(case: Case, dtype: torch.dtype, is_causal: bool) -> list[Tensor]:
    """Return output and gradients of dense torch at the dtype."""
    mask = case.mask(Setting(N, 0, is_causal))[None]
    return with_gradients(functools.partial(scaled_dot_product_attention, attn_mask=mask), rounded(dtype))


@all_dtypes
@both_backends
@pytest.mark.parametrize(
    "is_causal", [pytest.param(False, id="both_sides"), pytest.param(True, id="causal", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("case", NEVER_EMPTY, ids=case_name)
def test_rounding_is_no_worse_than_dense_torch(case: Case, is_causal: bool, backend: str, dtype: torch.dtype) -> None:
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    results = with_gradients(attend, rounded(dtype))
    theirs = dense(case, dtype, is_causal)
    for actual, wanted, other in zip(results, oracle(case, dtype, is_causal), theirs, strict=True):
        assert_within_rounding(actual, wanted, other)


@all_dtypes
@both_backends
@pytest.mark.parametrize("case", sampled())
def test_outputs_keep_the_dtype_and_the_logsumexp_is_precise(case: Case, backend: str, dtype: torch.dtype) -> None:
    query, key, value = rounded(dtype)
    out, lse = attention(case.pattern, backend=backend, return_lse=True)(query, key, value)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    mask = case.mask(Setting(N))[None]
    _, wanted = attend_by_rows(query, key, value, mask)
    # dense torch at float32, on the same rounded inputs
    scores = (query.float() @ key.float().mT * WIDTH**-0.5).masked_fill(~mask, float("-inf"))
    is_read = mask.any(-1)
    assert torch.equal(lse[~is_read], wanted.float()[~is_read])
    assert_within_rounding(lse[is_read], wanted[is_read], scores.logsumexp(-1)[is_read])


@both_backends
@pytest.mark.parametrize("case", sampled(NEVER_EMPTY))
def test_scores_beyond_the_range_of_half_precision_stay_finite(case: Case, backend: str) -> None:
    query, key, value = rounded(torch.float16)
    attend = attention(case.pattern, backend=backend)
    # scores of a hundred thousand: float16 ends at 65504
    for result in with_gradients(attend, [query * 200, key * 200, value]):
        assert result.isfinite().all()


@pytest.mark.parametrize("backend", ["gather", "auto"])
@pytest.mark.parametrize("case", sampled())
def test_autocast_around_forward_and_backward_changes_nothing(case: Case, backend: str) -> None:
    attend = attention(case.pattern, backend=backend)
    plain = with_gradients(attend, rounded(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        results = with_gradients(attend, rounded(torch.float32))
    for actual, wanted in zip(results, plain, strict=True):
        assert torch.equal(actual, wanted)
