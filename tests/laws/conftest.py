"""Settings of the laws."""

import pytest
import torch

from hf_sparse.backends import gather


@pytest.fixture(autouse=True, scope="module")
def tiny_tensors(one_thread: None) -> None:
    """Nothing here is large."""


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an output is to be written to holds no zeros by chance."""
    take = gather._by_token

    def take_dirty(like: torch.Tensor, width: int) -> torch.Tensor:
        return take(like, width).fill_(float("nan"))

    monkeypatch.setattr(gather, "_by_token", take_dirty)
