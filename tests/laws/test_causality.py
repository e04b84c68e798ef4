"""Law 4: causal means causal."""

import pytest
import torch
from torch import Tensor

import hf_sparse
from tests.pattern_cases import BACKENDS, CASES, HEADS, Case, attention, case_name
from tests.support.gradients import with_gradients
from tests.support.rounding import assert_same_maths
from tests.support.softmax import random_tensors

WIDTH = 4
N = 65
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@both_backends
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_tokens_from_p_on_do_not_reach_outputs_before_p(case: Case, backend: str) -> None:
    tensors = random_tensors(tokens=N, key_heads=2, width=WIDTH)
    attend = attention(case.pattern, is_causal=True, backend=backend, return_lse=True)
    before, before_lse = attend(*tensors)
    for p in (1, 8, 33, 64):
        changed = [torch.cat([tensor[:, :, :p], 50 * tensor[:, :, p:].flip(2) + 7], 2) for tensor in tensors]
        after, after_lse = attend(*changed)
        assert torch.equal(before[:, :, :p], after[:, :, :p])
        assert torch.equal(before_lse[:, :, :p], after_lse[:, :, :p])
        assert not torch.equal(before[:, :, p:], after[:, :, p:])


@both_backends
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_outputs_before_p_send_no_gradient_to_tokens_from_p_on(case: Case, backend: str) -> None:
    p = 20
    attend = attention(case.pattern, is_causal=True, backend=backend)
    weights = torch.zeros(1, HEADS, N, WIDTH, dtype=torch.float64)
    weights[:, :, :p] = 1.0
    _, *gradients = with_gradients(attend, random_tensors(tokens=N, width=WIDTH), weights=weights)
    for gradient in gradients:
        assert not gradient[:, :, p:].any()
        assert gradient[:, :, :p].any()


@both_backends
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_a_causal_prefix_alone_equals_the_prefix_of_the_whole(case: Case, backend: str) -> None:
    tensors = random_tensors(tokens=N, width=WIDTH)
    attend = attention(case.pattern, is_causal=True, backend=backend)
    whole = attend(*tensors)
    for p in (1, 8, 9, 40):
        alone = attend(*(tensor[:, :, :p] for tensor in tensors))
        assert_same_maths(alone, whole[:, :, :p], terms=N + WIDTH)


@both_backends
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_decoding_token_by_token_equals_one_pass(case: Case, backend: str) -> None:
    n = 26
    query, key, value = random_tensors(tokens=n, width=WIDTH)
    attend = attention(case.pattern, is_causal=True, backend=backend)
    whole = attend(query, key, value)
    steps = [attend(query[:, :, t : t + 1], key[:, :, : t + 1], value[:, :, : t + 1]) for t in range(n)]
    assert_same_maths(torch.cat([step for step in steps if isinstance(step, Tensor)], 2), whole, terms=n + WIDTH)


@both_backends
def test_decoding_with_padding_on_the_left_equals_one_pass(backend: str) -> None:
    # padding longer than all that is real, and blocks shorter than the padding
    pattern = hf_sparse.pattern("bigbird", block_size=4, num_random_blocks=1) | hf_sparse.pattern("band", radius=3)
    query, key, value = random_tensors(batch=2, tokens=40, width=WIDTH)
    is_real = torch.ones(2, 40, dtype=torch.bool)
    is_real[0, :29] = False
    attend = attention(pattern, is_causal=True, backend=backend)
    whole = attend(query, key, value, key_padding_mask=is_real)
    for tokens in (1, 5, 39):
        last = attend(query[:, :, -tokens:], key, value, key_padding_mask=is_real)
        at = is_real[:, -tokens:]
        assert_same_maths(last.transpose(1, 2)[at], whole[:, :, -tokens:].transpose(1, 2)[at], terms=40 + WIDTH)
