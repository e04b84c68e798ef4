"""Law 8: dropout equals an explicit float64 softmax with the drawn mask replayed, outputs and gradients.

A backend is a black box here. Values that are the identity matrix make its output the dropped probabilities themselves,
so what was drawn under a seed can be read off and given to the oracle.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_sparse
from tests.pattern_cases import BACKENDS, CASES, HEADS, Case, Setting, attention, case_name, case_of, sampled
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

N, WIDTH, SEED = 65, 4, 123
both_backends = pytest.mark.parametrize("backend", BACKENDS)
some_cases = pytest.mark.parametrize("case", sampled())


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of two samples, with two key heads."""
    return random_tensors(batch=2, tokens=N, key_heads=2, width=WIDTH)


def mask_of(case: Case, *, is_causal: bool = False) -> Tensor:
    """Return the oracle's mask for both samples."""
    return case.mask(Setting(N, 0, is_causal))[None].expand(2, -1, -1, -1)


@functools.cache
def probabilities(case: Case, is_causal: bool) -> Tensor:
    """Return what each query gives each key without dropout, by loops: float64 ``[B, H, N, N]``."""
    query, key, _ = tensors()
    return attend_by_rows(query, key, identity(), mask_of(case, is_causal=is_causal))[0]


def identity() -> Tensor:
    """Return values under which an output is its probabilities."""
    return torch.eye(N, dtype=torch.float64).expand(2, 2, -1, -1)


def read_off(case: Case, p: float, backend: str, *, is_causal: bool = False, seed: int = SEED) -> Tensor:
    """Return what a seed draws: bool ``[B, H, N, N]``, True where a probability was kept."""
    query, key, _ = tensors()
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    torch.manual_seed(seed)
    dropped = attend(query, key, identity(), dropout=p)
    is_kept = dropped > 0
    assert_same_maths(dropped, probabilities(case, is_causal) * is_kept / (1 - p), terms=N + WIDTH)
    return is_kept


@both_backends
@pytest.mark.parametrize(
    "is_causal", [pytest.param(False, id="both_sides", marks=pytest.mark.slow), pytest.param(True, id="causal")]
)
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_dropout_equals_the_oracle_with_the_draw_replayed(case: Case, is_causal: bool, backend: str) -> None:
    p = 0.3
    multiplier = read_off(case, p, backend, is_causal=is_causal).double() / (1 - p)
    mask = mask_of(case, is_causal=is_causal)
    wanted = with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask, multiplier=multiplier), tensors())
    attend = attention(case.pattern, is_causal=is_causal, backend=backend, dropout=p, return_lse=True)
    torch.manual_seed(SEED)
    results = with_gradients(attend, tensors())
    for actual, oracle in zip(results, wanted, strict=True):
        assert_same_maths(actual, oracle, terms=N + WIDTH)


@both_backends
@pytest.mark.parametrize("use_reentrant", [False, True])
@some_cases
def test_checkpointing_repeats_the_draw(case: Case, use_reentrant: bool, backend: str) -> None:
    attend = attention(case.pattern, backend=backend, dropout=0.4)
    torch.manual_seed(SEED)
    plain = with_gradients(attend, tensors())
    again = functools.partial(checkpoint, attend, use_reentrant=use_reentrant)
    torch.manual_seed(SEED)
    if use_reentrant:
        # the reentrant form works under backward() alone
        leaves = [tensor.requires_grad_() for tensor in tensors()]
        out = again(*leaves)
        out.backward(torch.ones_like(out))
        results = [out.detach(), *(leaf.grad for leaf in leaves)]
        torch.manual_seed(SEED)
        plain = with_gradients(attend, tensors(), weights=torch.ones_like(out))
    else:
        results = with_gradients(again, tensors())
    for actual, wanted in zip(results, plain, strict=True):
        assert torch.equal(actual, wanted)


@some_cases
def test_a_short_sequence_in_one_call_drops_the_same_pairs(case: Case) -> None:
    # equal heads and widths: what torch's fused kernel takes, which knows no dropout of ours
    held = random_tensors(batch=2, tokens=N, width=WIDTH)
    found = []
    for backend in ("dense", "auto"):
        torch.manual_seed(SEED)
        found.append(with_gradients(attention(case.pattern, backend=backend, dropout=0.3), held))
    for actual, wanted in zip(*found, strict=True):
        assert_same_maths(actual, wanted, terms=N + WIDTH)


@some_cases
def test_every_backend_drops_the_same_pairs(case: Case) -> None:
    first, *others = (read_off(case, 0.3, backend) for backend in BACKENDS)
    assert all(torch.equal(first, other) for other in others)


@both_backends
@pytest.mark.parametrize("p", [0.1, 0.9])
@some_cases
def test_the_kept_fraction_is_one_minus_p(case: Case, p: float, backend: str) -> None:
    is_kept = read_off(case, p, backend)
    edges = int(mask_of(case).sum())
    # five standard deviations of a binomial count
    assert abs(int(is_kept.sum()) - edges * (1 - p)) <= 5 * (edges * p * (1 - p)) ** 0.5


@both_backends
@some_cases
def test_every_place_is_drawn_by_itself(case: Case, backend: str) -> None:
    # rows, heads, samples and seeds: the draws of any two agree as often as chance has it
    first = read_off(case, 0.5, backend)
    other = read_off(case, 0.5, backend, seed=SEED + 1)
    mask = mask_of(case)
    pairs = [(first, other, mask), (first[0], first[1], mask[0])]
    pairs += [(first[:, :1], first[:, head : head + 1], mask[:, :1] & mask[:, head : head + 1]) for head in (1, 2, 3)]
    pairs += [
        (first[..., lag:, :], first[..., :-lag, :], mask[..., lag:, :] & mask[..., :-lag, :]) for lag in (1, 8, 64)
    ]
    for one, two, both in pairs:
        edges = int(both.sum())
        agreed = int(((one == two) & both).sum())
        assert abs(agreed - edges / 2) <= 5 * (edges / 4) ** 0.5


@both_backends
@pytest.mark.parametrize("name", ["bigbird_published", "by_head"])
def test_the_mean_over_draws_is_the_output_without_dropout(name: str, backend: str) -> None:
    case = case_of(name)
    p, draws = 0.25, 60
    query, key, value = tensors()
    wanted, _ = attend_by_rows(query, key, value, mask_of(case))
    # the variance of one output is p / (1 - p) times the sum of (probability * value)^2
    spread = probabilities(case, False) ** 2 @ value.repeat_interleave(HEADS // 2, 1) ** 2 * p / (1 - p)
    torch.manual_seed(SEED)
    total = torch.zeros_like(wanted)
    for _ in range(draws):
        out = attention(case.pattern, dropout=p, backend=backend)(query, key, value)
        total += out
    # squares of a normal number have mean 1 and variance 2; outputs of one query share their draw, so queries count
    off = ((total / draws - wanted) ** 2 / (spread / draws)).mean()
    assert off <= 1 + 5 * (2 / (2 * N * HEADS)) ** 0.5


@both_backends
@pytest.mark.parametrize("p", [1e-9, 0.999])
def test_the_smallest_and_largest_chance_work(p: float, backend: str) -> None:
    attend = attention(hf_sparse.pattern("band", radius=3), backend=backend)
    results = with_gradients(functools.partial(attend, dropout=p), tensors())
    assert all(result.isfinite().all() for result in results)
    if p < 0.5:
        assert_same_maths(results[0], attend(*tensors()) / (1 - p), terms=N + WIDTH)


@both_backends
@some_cases
def test_dropout_of_zero_draws_nothing(case: Case, backend: str) -> None:
    before = torch.get_rng_state()
    attention(case.pattern, backend=backend)(*tensors())
    assert torch.equal(before, torch.get_rng_state())


@both_backends
@some_cases
def test_padding_stays_inert_under_dropout(case: Case, backend: str) -> None:
    is_real = torch.ones(2, N, dtype=torch.bool)
    is_real[0, :20] = is_real[1, 50:] = False
    attend = attention(case.pattern, backend=backend, key_padding_mask=is_real, dropout=0.2)
    weights = is_real[:, None, :, None].double().expand(2, HEADS, N, WIDTH)
    for result in with_gradients(attend, tensors(), weights=weights)[1:]:
        assert result.isfinite().all()
        assert not result.transpose(1, 2)[~is_real].any()
        assert result.transpose(1, 2)[is_real].any()
