"""Calls from several threads of one process do not touch one another: no buffer or plan of one is seen by another."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from hf_sparse.backends import plans
from tests.pattern_cases import attention, case_of
from tests.support.gradients import with_gradients
from tests.support.softmax import random_tensors

PATTERN = case_of("longformer").pattern


def results(turn: int) -> list[Tensor]:
    """Return outputs and gradients of one call; each turn has tensors of its own."""
    tensors = [tensor.roll(turn, 2) for tensor in random_tensors(tokens=331, key_heads=2, width=16)]
    return with_gradients(attention(PATTERN, is_causal=False, layer=1, backend="gather"), tensors)


def test_calls_in_two_threads_give_what_they_give_alone() -> None:
    alone = [results(turn) for turn in range(8)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(results, [*range(8)] * 4))
    for i, found in enumerate(together):
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, alone[i % 8], strict=True))


def test_threads_that_plan_and_forget_do_not_disturb_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call meets a length that another has pushed out, and what plans hold is counted with every plan."""
    monkeypatch.setattr(plans, "RECOUNT", 1)
    monkeypatch.setattr(plans, "PLANS", plans.PlanCache(most_bytes=1 << 16))

    def run(turn: int) -> Tensor:
        tensors = random_tensors(tokens=280 + 7 * (turn % 40), width=4)
        out: Tensor = attention(PATTERN, is_causal=False, layer=1, backend="gather")(*tensors)
        return out

    alone = [run(turn) for turn in range(40)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run, [*range(40)] * 4))
    assert all(torch.equal(found, alone[i % 40]) for i, found in enumerate(together))
    assert plans.PLANS.misses > 80
