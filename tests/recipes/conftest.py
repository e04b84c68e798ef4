"""What the tests of recipes share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "sparse", "dense" and the same of GPT-2 and BART ("gpt2-", "bart-")."""
    pytest.importorskip("datasets", reason="the recipes need hf-sparse[recipes]")
    from tests.recipe_cases import write_checkpoints

    folder = tmp_path_factory.mktemp("models")
    write_checkpoints(folder)
    return folder
