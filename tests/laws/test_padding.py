"""Law 3: padding changes nothing for real tokens, rows of a batch do not touch, packed equals separate."""

import functools

import pytest
import torch
from torch import Tensor

from tests.pattern_cases import (
    BACKENDS,
    CASES,
    HEADS,
    WITH_GLOBALS,
    Case,
    Setting,
    attention,
    case_name,
    case_of,
    sampled,
)
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.rules import draw_batch
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4
REAL_LENGTH = tuple(case for case in CASES if not case.pattern.reads_padding)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
both_ways = pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])


def real_tokens(*rows: str) -> Tensor:
    """Read a padding mask: ``x`` is a real token."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


# left, right, both ends, holes, nothing but padding, no padding
MASK = real_tokens(
    "......xxxxxxxxxxxxxx", "xxxxxxxxxxx.........", "....xxxxxxxxx.......", ".xxxx..xxxxxxx.xxxx.", "." * 20, "x" * 20
)


def global_mask() -> Tensor:
    """Return global tokens that differ by sample, some of them on padding, one row without any."""
    mask = torch.zeros_like(MASK)
    for row, columns in enumerate([(0, 7, 8), (3, 10, 15), (), (5, 9, 14), (2,), (0, 19)]):
        mask[row, list(columns)] = True
    return mask


@functools.cache
def batch_oracle(case: Case, is_causal: bool, has_globals: bool) -> list[Tensor]:
    """Return output and gradients of the padded batch by loops; no gradient reaches padded queries."""
    batch, tokens = MASK.shape
    mask = draw_batch(
        lambda length, positions: case.mask(Setting(length, 0, is_causal, positions)),
        batch=batch,
        tokens=tokens,
        heads=HEADS,
        key_padding_mask=MASK,
        global_mask=global_mask() if has_globals else None,
        reads_padding=case.pattern.reads_padding,
    )
    tensors = random_tensors(batch=batch, tokens=tokens, key_heads=2, width=WIDTH)
    return with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask)[0], tensors, weights=weights())


def weights() -> Tensor:
    """Return what reaches the output: nothing at padding."""
    drawn = torch.randn(*MASK.shape, HEADS, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return drawn.mul(MASK[..., None, None]).transpose(1, 2)


def check_batch(case: Case, is_causal: bool, backend: str, globals_: Tensor | None) -> None:
    """Compare a padded batch with the oracle at real tokens, in outputs and all gradients."""
    attend = attention(
        case.pattern,
        is_causal=is_causal,
        backend=backend,
        key_padding_mask=MASK,
        global_mask=globals_,
    )
    batch, tokens = MASK.shape
    tensors = random_tensors(batch=batch, tokens=tokens, key_heads=2, width=WIDTH)
    results = with_gradients(attend, tensors, weights=weights())
    results[0] = results[0] * MASK[:, None, :, None]
    for actual, wanted in zip(results, batch_oracle(case, is_causal, globals_ is not None), strict=True):
        assert_same_maths(actual, wanted, terms=tokens + WIDTH)


@both_backends
@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_padded_batches_equal_the_loop_oracle(case: Case, is_causal: bool, backend: str) -> None:
    check_batch(case, is_causal, backend, None)


@both_backends
@both_ways
@pytest.mark.parametrize("case", WITH_GLOBALS, ids=case_name)
def test_global_masks_differ_by_sample(case: Case, is_causal: bool, backend: str) -> None:
    check_batch(case, is_causal, backend, global_mask())


@both_backends
@both_ways
@pytest.mark.parametrize(("left", "right"), [(70, 0), (5, 66)])
@pytest.mark.parametrize("case", REAL_LENGTH, ids=case_name)
def test_padding_at_the_ends_changes_nothing(case: Case, left: int, right: int, is_causal: bool, backend: str) -> None:
    n = 65
    tensors = random_tensors(tokens=n, key_heads=2, width=WIDTH)
    # padding that holds large numbers would be noticed
    padded = [torch.nn.functional.pad(tensor, (0, 0, left, right), value=300.0) for tensor in tensors]
    is_real = torch.zeros(1, left + n + right, dtype=torch.bool)
    is_real[:, left : left + n] = True
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    drawn = torch.randn(1, HEADS, n, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alone = with_gradients(attend, tensors, weights=drawn)
    around = torch.nn.functional.pad(drawn, (0, 0, left, right), value=1.0)
    inside = with_gradients(functools.partial(attend, key_padding_mask=is_real), padded, weights=around)
    for actual, wanted in zip(inside, alone, strict=True):
        assert_same_maths(actual[:, :, left : left + n], wanted, terms=n + WIDTH)
        assert not actual[:, :, ~is_real[0]].any()


def check_padding_is_inert(case: Case, backend: str, is_real: Tensor, *, is_causal: bool) -> None:
    """Padding tokens have output 0 and logsumexp -inf, and what reaches their output goes nowhere."""
    tensors = random_tensors(batch=len(is_real), tokens=is_real.shape[1], width=WIDTH)
    attend = attention(case.pattern, is_causal=is_causal, backend=backend, key_padding_mask=is_real)
    out, lse, *gradients = with_gradients(functools.partial(attend, return_lse=True), tensors)
    assert not out.transpose(1, 2)[~is_real].any()
    assert lse.transpose(1, 2)[~is_real].eq(float("-inf")).all()
    at_padding = (~is_real)[:, None, :, None].double().expand_as(out)
    _, *gradients = with_gradients(attend, tensors, weights=at_padding)
    assert not any(gradient.any() for gradient in gradients)


@both_backends
@both_ways
@pytest.mark.parametrize("case", sampled(REAL_LENGTH))
def test_padding_at_the_ends_gets_zeros_and_sends_no_gradient(case: Case, is_causal: bool, backend: str) -> None:
    check_padding_is_inert(case, backend, MASK[[0, 1, 2, 4]], is_causal=is_causal)


@both_backends
@pytest.mark.parametrize("name", ["band", "longformer", "bigbird_published", "by_head"])
def test_padding_between_real_tokens_gets_zeros_and_sends_no_gradient(name: str, backend: str) -> None:
    case = case_of(name)
    check_padding_is_inert(case, backend, MASK[[3]], is_causal=False)


@both_backends
def test_padding_under_a_padded_length_gets_zeros_and_sends_no_gradient(backend: str) -> None:
    (case,) = (case for case in CASES if case.pattern.reads_padding)
    check_padding_is_inert(case, backend, MASK, is_causal=False)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", sampled())
def test_a_row_of_padding_gives_zeros_and_never_nan(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = [tensor.to(dtype) for tensor in random_tensors(batch=2, tokens=20, width=WIDTH)]
    is_real = torch.ones(2, 20, dtype=torch.bool)
    is_real[1] = False
    attend = attention(case.pattern, backend=backend, key_padding_mask=is_real, return_lse=True)
    for result in with_gradients(attend, tensors):
        assert not result.isnan().any()
        assert not result[1].any() or result[1].eq(float("-inf")).all()


@both_backends
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_rows_of_a_batch_do_not_touch(case: Case, backend: str) -> None:
    tensors = random_tensors(batch=3, tokens=20, width=WIDTH)
    attend = attention(case.pattern, backend=backend)
    weights = torch.zeros(3, HEADS, 20, WIDTH, dtype=torch.float64)
    weights[1] = 1.0
    before = with_gradients(attend, tensors, weights=weights)
    for gradient in before[1:]:
        assert not gradient[[0, 2]].any()
        assert gradient[1].isfinite().all()
    other = [torch.cat([tensor[:1] + 5, tensor[1:2], tensor[2:] * -3]) for tensor in tensors]
    after = with_gradients(attend, other, weights=weights)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one[1], two[1])


@both_backends
@both_ways
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_packed_equals_separate(case: Case, is_causal: bool, backend: str) -> None:
    # two rows of documents, ids in no order, padding below 0
    documents = {(0, 0, 13): 7, (0, 13, 14): 2, (0, 14, 30): 5, (1, 2, 25): 0, (1, 25, 28): 9}
    ids = torch.full((2, 30), -1)
    for (row, start, stop), name in documents.items():
        ids[row, start:stop] = name
    tensors = random_tensors(batch=2, tokens=30, width=WIDTH)
    weights = torch.randn(2, HEADS, 30, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    attend = attention(case.pattern, is_causal=is_causal, backend=backend)
    packed = with_gradients(functools.partial(attend, document_ids=ids), tensors, weights=weights)
    for row, start, stop in documents:
        at = slice(row, row + 1), slice(None), slice(start, stop)
        separate = with_gradients(attend, [tensor[at] for tensor in tensors], weights=weights[at])
        for actual, wanted in zip(packed, separate, strict=True):
            assert_same_maths(actual[at], wanted, terms=30 + WIDTH)
    for result in packed:
        assert not result.transpose(1, 2)[ids < 0].any()


@both_backends
@pytest.mark.parametrize("case", WITH_GLOBALS, ids=case_name)
def test_a_global_mask_counts_from_the_start_of_each_document(case: Case, backend: str) -> None:
    ids = torch.tensor([[3] * 12 + [1] * 9 + [-1] * 2])
    is_global = torch.zeros(1, 23, dtype=torch.bool)
    is_global[0, [0, 5, 13, 20, 22]] = True
    tensors = random_tensors(tokens=23, width=WIDTH)
    packed = attention(case.pattern, document_ids=ids, global_mask=is_global, backend=backend)(*tensors)
    for start, stop, positions in ((0, 12, (0, 5)), (12, 21, (1, 8))):
        q, k, v = (tensor[:, :, start:stop] for tensor in tensors)
        mask = case.mask(Setting(stop - start, positions=positions))[None]
        assert_same_maths(packed[:, :, start:stop], attend_by_rows(q, k, v, mask)[0], terms=12 + WIDTH)


@both_backends
@pytest.mark.parametrize("case", WITH_GLOBALS, ids=case_name)
def test_a_global_mask_without_tokens_leaves_no_global_token(case: Case, backend: str) -> None:
    tensors = random_tensors(tokens=20, width=WIDTH)
    none = torch.zeros(1, 20, dtype=torch.bool)
    out = attention(case.pattern, global_mask=none, backend=backend)(*tensors)
    mask = case.mask(Setting(20, positions=()))[None]
    assert_same_maths(out, attend_by_rows(*tensors, mask)[0], terms=20 + WIDTH)
