"""What a launcher says of processes, precision and devices is heeded, or refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from hf_sparse.errors import RecipeError
from hf_sparse.recipes import results
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.training import _peak_memory
from tests.recipe_cases import arguments, labelled, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def things(tmp_path: Path) -> str:
    return write(tmp_path / "things", labelled)


@pytest.mark.parametrize(
    ("launcher", "task", "fields", "said"),
    [
        ("FSDP", "distill", {"teacher": "dense"}, "distill judges the model before it is trained, which FSDP does not"),
        ("DeepSpeed", "classify", {"lora": 2}, "--lora merges adapters at the end, which DeepSpeed does not allow"),
    ],
)
def test_what_spread_weights_do_not_allow_is_refused(
    launcher: str,
    task: str,
    fields: dict[str, Any],
    said: str,
    checkpoints: Path,
    things: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{launcher.upper()}", "true")
    with pytest.raises(RecipeError, match=said):
        finetune(task, arguments(checkpoints, things, tmp_path / "run", **fields))
    assert not (tmp_path / "run").exists()


def test_precision_is_that_of_the_launcher_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RecipeArguments("m", "d", "o").precision == "float32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert RecipeArguments("m", "d", "o").for_task("classify").precision == "bf16"
    assert RecipeArguments("m", "d", "o", precision="bf16").precision == "bf16"
    with pytest.raises(ValueError, match="--precision is float32, and mixed_precision of the launcher's config bf16"):
        RecipeArguments("m", "d", "o", precision="float32")


def test_a_cpu_beside_a_gpu_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert [results.surroundings(use_cpu=held)["device"] for held in (True, False)] == ["cpu", "a GPU"]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert results.surroundings(use_cpu=False)["device"] == "cpu"
    assert _peak_memory(torch.device("cpu")) > 50


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(
    checkpoints: Path, things: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = arguments(checkpoints, things, tmp_path / "run", epochs=1.0)
    finetune("classify", held)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="was begun with processes=1, not 2"):
        finetune("classify", dataclasses.replace(held, resume=True))
    begun = json.loads((tmp_path / "run" / "recipe.json").read_text())
    begun.pop("processes")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(begun))
    monkeypatch.delenv("WORLD_SIZE")
    # of what was begun before it was written down nothing is known
    assert finetune("classify", dataclasses.replace(held, resume=True))["runs"]
