"""A checkpoint that was not written to its end is passed over."""

from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")

from hf_sparse.recipes.checkpoints import last_whole_checkpoint


def test_the_newest_that_is_whole_is_taken(tmp_path: Path) -> None:
    assert last_whole_checkpoint(tmp_path / "nowhere") is None
    assert last_whole_checkpoint(tmp_path) is None
    for step, state in ((4, "{}"), (8, "{}"), (12, '{"log_his'), (16, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
