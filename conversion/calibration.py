"""Calibration on the way: centroids go to where the source's queries and keys are on a text."""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from hf_sparse.conversion.source import Checkpoint
from hf_sparse.conversion.target import Target
from hf_sparse.conversion.texts import MOST_TOKENS, read_text, tokenize
from hf_sparse.conversion.verify import quietly
from hf_sparse.errors import ConversionError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.calibrate import calibrate_

STEPS = 5


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a text gave.

    Attributes:
        pieces: int64 ``[1, T]`` each, special tokens included; as long as the destination's longest input but for the last.
        tokens: of all pieces.
        note: what is done, in words.
    """

    pieces: tuple[Tensor, ...]
    tokens: int
    note: str


def plan_calibration(path: str | os.PathLike[str], checkpoint: Checkpoint, target: Target) -> Calibration:
    """Read a text and cut it.

    Args:
        path: a plain text in UTF-8, read as one text whatever its lines are; of a long one the first ``MOST_TOKENS`` tokens.
        checkpoint: the source, whose tokenizer reads it.
        target: what it becomes.

    Raises:
        ConversionError: if no layer has anything to calibrate, the file is no text, or there is no tokenizer.
    """
    if not target.centroids:
        pattern = target.entry.pattern.key
        raise ConversionError(
            "calibrate moves the centroids of 'routing', and no layer has that pattern (the pattern is "
            f"{pattern!r}); leave it out"
        )
    if target.image_size is not None:
        raise ConversionError(f"calibrate reads a text, and {checkpoint.name} reads images; leave it out")
    checkpoint.check_dense("calibrate")
    texts = tokenize([read_text(Path(path), "calibrate")], str(path), checkpoint, "calibrate")
    room = target.length - texts.special
    held = texts.documents[0][:MOST_TOKENS]
    pieces = tuple(texts.row(held[at : at + room]) for at in range(0, len(held), room))
    layers = len({name.rpartition(".")[0] for name in target.centroids})
    text = f"the first {len(held):,} tokens" if len(held) == MOST_TOKENS else f"the {len(held):,} tokens"
    note = f"centroids of {layers} layer{'' if layers == 1 else 's'}, by {STEPS} steps of Lloyd's algorithm on {text} of {path}"
    return Calibration(pieces, len(held), note)


def calibrated(checkpoint: Checkpoint, target: Target, calibration: Calibration) -> dict[str, Tensor]:
    """Return what ``target.centroids`` names, in float32, as a text moves it in a model of the source's weights."""
    with quietly(), _telling(calibration), torch.random.fork_rng(devices=[]):
        cls: Any = sparse_model_class(target.dense_class)
        model = cls.from_pretrained(checkpoint.folder, config=copy.deepcopy(target.config), dtype=torch.float32)
        batches = [{"input_ids": piece, "attention_mask": torch.ones_like(piece)} for piece in calibration.pieces]
        # a head has nothing to do here
        calibrate_(model.base_model, batches, iterations=STEPS)
    state = model.state_dict()
    return {name: state[name] for name in target.centroids}


@contextlib.contextmanager
def _telling(calibration: Calibration) -> Iterator[None]:
    """Tell a person who waits at a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"calibrating on {calibration.tokens:,} tokens"):
        yield
