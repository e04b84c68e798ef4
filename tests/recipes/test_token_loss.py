"""What is learned of tokens: each counts alike, whatever batch of a step it lies in, and masks are the same when gone on."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from datasets import Dataset

from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.language import Causal, Masked, MaskingTrainer
from hf_sparse.recipes.token_loss import NextTokenTrainer, TokenTrainer
from tests.recipe_cases import FAMILIES, TASKS, Stopped, arguments, break_off, count_steps, plain, write

pytestmark = pytest.mark.usefixtures("one_thread")
DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def without_dropout(checkpoints: Path, task: str, folder: Path) -> str:
    """Copy a sparse checkpoint and switch its dropout off."""
    shutil.copytree(checkpoints / f"{FAMILIES.get(task, ('', ''))[0]}sparse", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **{name: 0.0 for name in DROPOUT if name in config}}))
    return str(folder)


@pytest.mark.parametrize("task", ["mlm", "clm", "summarize", "tag"])
def test_a_step_is_the_same_in_one_batch_or_in_two(task: str, checkpoints: Path, tmp_path: Path) -> None:
    make, fields, _ = TASKS[task]
    dataset, model = write(tmp_path / "data", make), without_dropout(checkpoints, task, tmp_path / "model")
    logged = []
    for batch, accumulated in ((4, 1), (2, 2)):
        own = {
            "batch_size": batch,
            "gradient_accumulation_steps": accumulated,
            "max_steps": 3,
            "save_steps": 3,
            **fields,
        }
        if task in ("mlm", "clm"):
            # documents of several lengths
            own |= {"packing": False, "truncate": True}
        held = arguments(checkpoints, dataset, tmp_path / f"run-{batch}", task, **own)
        held.model = model
        (run,) = finetune(task, held)["runs"]
        state = json.loads((Path(run["folder"]) / "checkpoint-3" / "trainer_state.json").read_text())
        logged.append([(entry["loss"], entry["grad_norm"]) for entry in state["log_history"] if "loss" in entry])
    whole, parts = (torch.tensor(held) for held in logged)
    assert whole.shape == (3, 2)
    torch.testing.assert_close(parts, whole, rtol=2e-5, atol=0)


def test_the_same_tokens_are_masked_when_a_run_goes_on_inside_an_epoch(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write(tmp_path / "data", plain)
    fields: dict[str, Any] = {"epochs": 2.0, "save_steps": 6, "packing": False, "truncate": True}
    (whole,) = finetune("mlm", arguments(checkpoints, dataset, tmp_path / "whole", **fields))["runs"]
    with monkeypatch.context() as patch:
        break_off(patch, at=7)
        with pytest.raises(Stopped):
            finetune("mlm", arguments(checkpoints, dataset, tmp_path / "parts", **fields))
    taken = count_steps(monkeypatch)
    (again,) = finetune("mlm", arguments(checkpoints, dataset, tmp_path / "parts", resume=True, **fields))["runs"]
    # epochs have four steps
    assert taken == [6, 7]
    assert again["losses"] == whole["losses"]
    assert len(set(whole["losses"])) == 8


def test_what_is_judged_is_the_mean_of_its_batch() -> None:
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 2, -100, 3, 4], [5, -100, -100, -100, 6]])
    for trainer, said, wanted in (
        (TokenTrainer, logits, labels),
        (NextTokenTrainer, logits[:, :-1], labels[:, 1:]),
    ):
        losses = torch.nn.functional.cross_entropy(said.transpose(1, 2), wanted, reduction="none")
        for is_training, count in ((False, (wanted != -100).sum()), (True, 40)):
            model: Any = Said(logits, is_training)
            held = trainer.compute_loss(
                trainer.__new__(trainer), model, {"labels": labels}, num_items_in_batch=torch.tensor(40)
            )
            torch.testing.assert_close(held, losses.sum() / count)


class Said:
    """A model that says what it is told to say."""

    def __init__(self, logits: torch.Tensor, is_training: bool) -> None:
        self.logits, self.training = logits, is_training

    def __call__(self) -> dict[str, torch.Tensor]:
        return {"logits": self.logits}


def test_masks_are_drawn_for_each_row_and_anew_in_each_step(tokenizer: Any) -> None:
    ids = torch.arange(5, 105).view(2, 50)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # the second row alone, with padding
    alone = {
        "input_ids": torch.nn.functional.pad(ids[1:], (0, 14)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids[1:]), (0, 14)),
    }

    def masked_at(step: int, batch: dict[str, Any]) -> dict[str, Any]:
        trainer: Any = SimpleNamespace(
            args=SimpleNamespace(seed=1), state=SimpleNamespace(global_step=step), processing_class=tokenizer
        )
        return MaskingTrainer.labelled(trainer, batch)

    found, other, later = masked_at(3, whole), masked_at(3, alone), masked_at(4, whole)
    assert found["input_ids"][1].equal(other["input_ids"][0, :50])
    assert found["labels"][1].equal(other["labels"][0, :50])
    assert (other["labels"][0, 50:] == -100).all()
    assert (other["input_ids"][0, 50:] == 0).all()
    is_masked = found["labels"] != -100
    assert is_masked.any()
    assert found["labels"][is_masked].equal(ids[is_masked])
    assert found["input_ids"][~is_masked].equal(ids[~is_masked])
    assert not found["labels"].equal(later["labels"])


@pytest.mark.parametrize("task", [Masked, Causal])
def test_a_dense_model_reads_no_two_documents_in_a_row(task: Any, checkpoints: Path, tokenizer: Any) -> None:
    splits = dict.fromkeys(("train", "validation", "test"), Dataset.from_dict({"text": ["the name"] * 3}))
    own = task(splits, RecipeArguments("m", "d", "o"))
    joined, apart = (
        own.encode(splits["test"], "test", tokenizer, Reading(64, cuts=True, is_dense=is_dense))
        for is_dense in (False, True)
    )
    assert [len(set(row)) for row in joined["document_ids"]] == [3]
    assert [set(row) for row in apart["document_ids"]] == [{0}] * 3
    assert sum(map(len, apart["input_ids"])) == len(joined["input_ids"][0])


@pytest.fixture
def tokenizer(checkpoints: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoints / "dense")
