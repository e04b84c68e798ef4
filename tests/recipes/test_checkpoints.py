"""A checkpoint that was not written to its end is passed over."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

import torch
from safetensors.torch import save_file

from hf_sparse.recipes import checkpoints
from hf_sparse.recipes.checkpoints import last_whole_checkpoint, take_home


def write(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "clock.json").write_text("1.5")
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(100)}, folder / name)
    return folder


def test_the_newest_that_is_whole_is_taken(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step in (4, 8):
        write(tmp_path / f"checkpoint-{step}")
    (write(tmp_path / "checkpoint-12") / "trainer_state.json").write_text('{"log_his')
    (tmp_path / "checkpoint-16").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "clock.json", "model.safetensors", "optimizer.pt", "rng_state.pth"]
)
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_one_with_a_file_that_is_cut_short_is_passed_over(tmp_path: Path, name: str, share: float) -> None:
    write(tmp_path / "checkpoint-4")
    path = write(tmp_path / "checkpoint-8") / name
    held = path.read_bytes()
    path.write_bytes(held[: int(share * len(held))] if name != "clock.json" else b"")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_each_process_has_to_have_written_what_it_draws_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "count_processes", lambda: 2)
    for step in (4, 8):
        path = write(tmp_path / f"checkpoint-{step}")
        shutil.copy(path / "rng_state.pth", path / "rng_state_0.pth")
    shutil.copy(path / "rng_state.pth", tmp_path / "checkpoint-4" / "rng_state_1.pth")
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_folder_that_was_moved_finds_its_best_checkpoint(tmp_path: Path) -> None:
    for step in (4, 8):
        write(tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-8" / "trainer_state.json"
    state.write_text('{"best_model_checkpoint": "/gone/seed-0/checkpoint-4", "global_step": 8}')
    take_home(str(state.parent))
    assert json.loads(state.read_text()) == {
        "best_model_checkpoint": str(tmp_path / "checkpoint-4"),
        "global_step": 8,
    }
