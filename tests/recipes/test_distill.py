"""Distillation: what is compared, and in which rows."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from datasets import Dataset
from transformers import AutoTokenizer

from hf_sparse.recipes.documents import read_splits
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.distill import Distillation, _relations
from tests.recipe_cases import arguments, passage, plain, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(checkpoints: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints / "dense")


def test_of_a_long_row_the_tokens_that_are_compared_count_for_all() -> None:
    real = torch.arange(1000) < torch.tensor([[1000], [700]])
    *_, picked, share = _relations(torch.randn(2, 1000, 4), torch.randn(2, 1000, 4), real)
    assert picked.sum(1).max() <= 256
    assert (picked * share).sum(1).tolist() == pytest.approx([1000.0, 700.0])


def test_distillation_is_chosen_by_whole_rows_unless_none_are_trained_on(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)
    for share, wanted in ((0.5, "kl_long"), (1.0, "kl")):
        held = arguments(checkpoints, dataset, tmp_path / "run", teacher="dense", short_share=share)
        assert Distillation(read_splits(held, Distillation.columns(held)), held).best == wanted


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_distillation_is_within_the_dense_length_and_then_longer(checkpoints: Path, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)
    fields = {"teacher": "dense", "short_share": 0.5, "max_steps": 4, "save_steps": 4, "lora": 2}
    held = arguments(checkpoints, dataset, tmp_path / "run", **fields)
    widths: list[int] = []
    loss = Distillation.loss

    def noted(self: Distillation, model: Any, teacher: Any, batch: Any) -> Any:
        widths.append(batch["input_ids"].shape[1])
        return loss(self, model, teacher, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "loss", noted)
        finetune("distill", held)
    assert widths[:2] == [64, 64]
    assert min(widths[2:]) > 64


def test_a_teacher_reads_long_rows_in_parts_of_its_length(checkpoints: Path, tokenizer: Any, tmp_path: Path) -> None:
    dataset = write(tmp_path / "data", plain)
    fields = {"teacher": "dense", "hidden": 1.0, "attention": 1.0}
    held = arguments(checkpoints, dataset, tmp_path / "run", **fields)
    task = Distillation(read_splits(held, Distillation.columns(held)), held)
    ids = tokenizer(passage(random.Random(0), 150), truncation=True, max_length=150)["input_ids"]
    rows = task.encode(Dataset.from_dict({"text": [tokenizer.decode(ids[1:-1])]}), "test", tokenizer, Reading(256))
    ids = torch.tensor(rows[0]["input_ids"])
    teacher = task.load(held.teacher or "").eval()
    with torch.no_grad():
        said, is_read = task._in_parts(
            teacher, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}, True, True
        )
        assert is_read[0].tolist() == [False, *[True] * (len(ids) - 2), False]
        for start in range(1, len(ids) - 1, 62):
            own = ids[start : min(start + 62, len(ids) - 1)]
            part = torch.cat([ids[:1], own, ids[-1:]])[None]
            alone = task._say(teacher, {"input_ids": part, "attention_mask": torch.ones_like(part)}, True, True)
            for whole, one in zip(said.fields(), alone.fields(), strict=True):
                torch.testing.assert_close(whole[0, start : start + len(own)], one[0, 1:-1], rtol=1e-4, atol=1e-5)
