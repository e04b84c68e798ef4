"""A run that was broken off goes on as what it was, and ends where it would have ended."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer

from hf_sparse.errors import FailedRunError, RecipeError
from hf_sparse.recipes.finetune import finetune
from tests.recipe_cases import Stopped, arguments, break_off, count_steps, labelled, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def things(tmp_path: Path) -> str:
    return write(tmp_path / "things", labelled)


def test_patience_is_not_forgotten_when_a_run_goes_on(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", learning_rate=0.0, patience=2, epochs=8.0)
    with monkeypatch.context() as patch:
        # behind the second epoch, which was no better than the first
        break_off(patch, at=9)
        with pytest.raises(Stopped):
            finetune("classify", held)
    held = dataclasses.replace(held, resume=True)
    (run,) = finetune("classify", held)["runs"]
    assert run["steps"] == 3 * 4
    # broken off while it was judged
    (tmp_path / "run" / "seed-0" / "run.json").unlink()
    taken = count_steps(monkeypatch)
    (again,) = finetune("classify", held)["runs"]
    assert taken == []
    assert (again["steps"], again["metrics"], again["losses"]) == (12, run["metrics"], run["losses"])


def test_a_run_that_is_over_is_judged_by_its_best_epoch(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", max_steps=6, save_steps=3, learning_rate=0.3)
    (run,) = finetune("classify", held)["runs"]
    folder = tmp_path / "run" / "seed-0"
    state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
    # which is not the last one
    assert state["best_model_checkpoint"].endswith("checkpoint-3")
    weights = load_file(folder / "model.safetensors")
    (folder / "run.json").unlink()
    taken = count_steps(monkeypatch)
    (again,) = finetune("classify", dataclasses.replace(held, resume=True))["runs"]
    assert taken == []
    assert again["metrics"] == run["metrics"]
    best = load_file(Path(state["best_model_checkpoint"]) / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, weights[name])
        assert torch.equal(weight, best[name])


def test_what_was_begun_otherwise_is_not_gone_on_with(checkpoints: Path, things: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(checkpoints / "sparse", own)

    def run(**fields: Any) -> dict[str, Any]:
        held = arguments(checkpoints, things, tmp_path / "run", epochs=1.0, **fields)
        return finetune("classify", dataclasses.replace(held, model=str(own)))

    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(RecipeError, match=match):
            run(resume=True, **fields)

    run()
    # baselines may follow
    assert [one["model"] for one in run(resume=True, baselines="dense")["runs"]] == ["sparse", "truncated", "chunks"]
    shutil.copytree(checkpoints / "dense", checkpoints / "other-dense", dirs_exist_ok=True)
    refused("was begun with baselines=", baselines="other-dense")
    (tmp_path / "things" / "test.jsonl").write_text('{"text": "a", "label": "0"}\n')
    refused("was begun with documents=")
    write(tmp_path / "again", labelled)
    shutil.copy(tmp_path / "again" / "test.jsonl", tmp_path / "things")
    (tmp_path / "run" / "seed-0" / "run.json").write_text('{"model": "spa')
    refused(r"run\.json is damaged \(.*\); remove it, and the run before it is done again")
    config = json.loads((own / "config.json").read_text())
    config["sparse_attention"]["pattern"]["window"] = 16
    (own / "config.json").write_text(json.dumps(config))
    refused("was begun with config_of_model=")
    (tmp_path / "run" / "recipe.json").write_text("{")
    refused(r"recipe\.json is damaged")


def test_a_folder_that_was_moved_is_gone_on_with_from_its_best(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nothing gets better, so the first epoch is the best
    fields = {"learning_rate": 0.0, "head_learning_rate": 1e-9, "epochs": 4.0}
    with monkeypatch.context() as patch:
        break_off(patch, at=13)
        with pytest.raises(Stopped):
            finetune("classify", arguments(checkpoints, things, tmp_path / "run", **fields))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    taken = count_steps(monkeypatch)
    finetune("classify", arguments(checkpoints, things, tmp_path / "moved", resume=True, **fields))
    assert taken == [12, 13, 14, 15]
    state = json.loads((tmp_path / "moved" / "seed-0" / "checkpoint-16" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / "seed-0" / "checkpoint-4")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("training_step", OSError("No space left on device")),
        ("training_step", torch.OutOfMemoryError("out of\nmemory")),
        ("_save_optimizer_and_scheduler", RuntimeError("PytorchStreamWriter failed writing file data/0")),
        ("save_model", SafetensorError("Error while serializing")),
    ],
    ids=lambda held: type(held).__name__,
)
def test_what_goes_wrong_on_the_way_says_that_training_had_begun(
    where: str, error: Exception, checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, where, fail)
    said = " ".join(str(error).split())
    with pytest.raises(FailedRunError, match=rf"{said} \(after training had begun; .* keeps its"):
        finetune("classify", arguments(checkpoints, things, tmp_path / "full", epochs=1.0))


def test_a_run_without_weights_is_not_done(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Trainer.save_model

    def save_checkpoints(self: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call:
            save(self, output_dir, _internal_call)

    monkeypatch.setattr(Trainer, "save_model", save_checkpoints)
    with pytest.raises(FailedRunError, match="Trainer wrote no weights to"):
        finetune("classify", arguments(checkpoints, things, tmp_path / "run", epochs=1.0))
    assert not (tmp_path / "run" / "seed-0" / "run.json").exists()


def test_training_stops_where_nothing_gets_better(checkpoints: Path, things: str, tmp_path: Path) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", learning_rate=0.0, patience=2, epochs=8.0)
    (run,) = finetune("classify", held)["runs"]
    # the first of them, and two that are no better
    assert run["steps"] == 3 * 4
