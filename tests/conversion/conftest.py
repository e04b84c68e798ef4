"""Checkpoints that the tests of conversion share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from tests.support.checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture(autouse=True, scope="package")
def quiet_on_one_thread() -> Iterator[None]:
    """Run on one thread, as models this small cost more on two, and without transformers' bars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT in two shards, with a tokenizer: 128 tokens."""
    folder = tmp_path / "bert"
    write_checkpoint(folder, "Bert", "ForMaskedLM", max_shard_size="60KB")
    write_tokenizer(folder, "Bert")
    return folder
