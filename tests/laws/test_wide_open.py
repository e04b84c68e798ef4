"""Law 1: wide open equals dense."""

import functools

import pytest
import torch
from torch import Tensor

import hf_sparse
from hf_sparse.patterns import Pattern
from tests.pattern_cases import BACKENDS, CASES, HEADS, Case, attention, case_name
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import attend_by_rows, random_tensors

WIDTH = 4


@functools.cache
def dense(n: int, is_causal: bool) -> list[Tensor]:
    """Return output and gradients of dense attention, by loops."""
    mask = torch.ones(1, HEADS, n, n).tril(0 if is_causal else n).bool()
    return with_gradients(lambda q, k, v: attend_by_rows(q, k, v, mask)[0], random_tensors(tokens=n, width=WIDTH))


def can_open(case: Case, is_causal: bool) -> bool:
    """Say whether some setting makes a case dense: causal random blocks lie before the query's own block, always."""
    return not (is_causal and case.name == "random")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("n", [1, 65])
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_wide_open_equals_dense(case: Case, n: int, is_causal: bool, backend: str) -> None:
    if not can_open(case, is_causal):
        assert not case.pattern.wide_open(n).mask(n, is_causal=True).any()
        return
    opened = case.pattern.wide_open(n)
    attend = attention(opened, is_causal=is_causal, layer=1, backend=backend)
    results = with_gradients(attend, random_tensors(tokens=n, width=WIDTH))
    for actual, wanted in zip(results, dense(n, is_causal), strict=True):
        assert_same_maths(actual, wanted, terms=n + WIDTH)


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_wide_open_stays_open_on_shorter_sequences(case: Case) -> None:
    opened = case.pattern.wide_open(65)
    for n in (1, 7, 65):
        assert opened.mask(n, heads=HEADS).all()


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_wide_open_is_the_same_system(case: Case) -> None:
    opened = case.pattern.wide_open(65)
    assert type(opened) is type(case.pattern)
    assert opened.has_global_tokens == case.pattern.has_global_tokens
    assert opened.reads_padding == case.pattern.reads_padding


class Closed(Pattern):
    """A pattern that no setting opens."""

    key = "closed"


def test_a_pattern_that_cannot_open_says_so() -> None:
    with pytest.raises(ValueError, match="pattern 'closed' has no setting under which every token reads every token"):
        Closed().wide_open(8)


def test_a_union_opens_when_one_member_can() -> None:
    band = hf_sparse.pattern("band", radius=1)
    opened = (Closed() | band).wide_open(8)
    assert opened == Closed() | hf_sparse.pattern("band", radius=8)
    with pytest.raises(ValueError, match="has no setting"):
        (Closed() | Closed()).wide_open(8)


def test_by_head_opens_only_when_all_members_can() -> None:
    band = hf_sparse.pattern("band", radius=1)
    with pytest.raises(ValueError, match="has no setting"):
        hf_sparse.by_head({0: band, 1: Closed()}).wide_open(8)
