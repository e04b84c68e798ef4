"""The order of the training documents depends on the seed and the epoch alone."""

from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from pathlib import Path

from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.order import ByLength, OrderedTrainer
from tests.recipe_cases import TASKS, arguments, write

LENGTHS = [3 + 7 * i % 41 for i in range(64)]


def order(seed: int, epoch: int, *, step: int = 4) -> list[int]:
    sampler = ByLength(LENGTHS, step=step, seed=seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(LENGTHS)
    return list(sampler)


def test_it_does_not_depend_on_what_was_drawn_before() -> None:
    first = order(0, 1)
    torch.rand(7)
    assert order(0, 1) == first


def test_each_epoch_and_each_seed_has_its_own() -> None:
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(one) == list(range(64)) for one in orders)
    assert len(set(map(tuple, orders))) == 9


def test_documents_of_a_step_are_of_about_one_length() -> None:
    def padding(indices: list[int]) -> int:
        steps = [[LENGTHS[i] for i in indices[at : at + 4]] for at in range(0, 64, 4)]
        return sum(max(step) * 4 - sum(step) for step in steps)

    assert padding(order(0, 0)) < 0.5 * padding(torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist())


@pytest.mark.parametrize("task", ["classify", "mlm", "retrieve"])
def test_recipes_read_in_that_order(
    task: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, fields, _ = TASKS[task]
    samplers = []
    sampler_of = OrderedTrainer._get_train_sampler

    def keep(self: OrderedTrainer, *args: Any) -> Any:
        samplers.append(sampler_of(self, *args))
        return samplers[-1]

    monkeypatch.setattr(OrderedTrainer, "_get_train_sampler", keep)
    dataset = write(tmp_path / "data", make)
    finetune(task, arguments(checkpoints, dataset, tmp_path / "run", task, max_steps=1, **fields))
    assert samplers
    assert all(isinstance(sampler, ByLength) for sampler in samplers)
