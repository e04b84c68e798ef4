"""Calibration on the way: centroids go to where the source's queries and keys are on a text."""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

from hf_sparse.conversion.companions import VOCABULARIES
from hf_sparse.conversion.source import Checkpoint
from hf_sparse.conversion.target import Target
from hf_sparse.conversion.verify import quietly
from hf_sparse.errors import ConversionError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.calibrate import calibrate_

STEPS = 5
# directions settle on far fewer; a long text is not read to its end
MOST_TOKENS = 32_768
# more than a token holds of any text in words
_CHARACTERS_PER_TOKEN = 16


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
    ids, blank = _read_ids(_read_text(Path(path)), str(path), checkpoint)
    room = target.length - len(blank)
    held = ids[:MOST_TOKENS]
    # a special token in front, and what there is besides behind
    cut = [[*blank[:1], *held[at : at + room], *blank[1:]] for at in range(0, len(held), room)]
    pieces = tuple(torch.tensor([piece]) for piece in cut)
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


def _read_text(path: Path) -> str:
    try:
        raw = path.expanduser().read_bytes()
    except FileNotFoundError:
        raise ConversionError(f"calibrate: there is no file {path}; pass a plain text in UTF-8") from None
    except OSError as error:
        raise ConversionError(
            f"calibrate: {path} cannot be read ({error.strerror}); pass a plain text in UTF-8"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"calibrate: {path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; save it as UTF-8"
        ) from error
    if not text.strip():
        raise ConversionError(f"calibrate: {path} is empty; pass a text of a few thousand words")
    return text


def _read_ids(text: str, name: str, checkpoint: Checkpoint) -> tuple[list[int], list[int]]:
    """Return the tokens of a text, and those that stand around any text."""
    inner = PurePosixPath(checkpoint.inner)
    if not any(path.parent == inner and path.name in VOCABULARIES for path in checkpoint.files):
        # transformers would make one that knows no word
        raise ConversionError(
            f"calibrate reads a text, and {checkpoint.name} has no tokenizer; save one beside its config.json"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
        settings: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}
        text = text[: MOST_TOKENS * _CHARACTERS_PER_TOKEN]
        ids = tokenizer(text, add_special_tokens=False, **settings)["input_ids"]
        blank = tokenizer("", **settings)["input_ids"]
    # a tokenizer may be broken, or need a library that is not here
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"calibrate reads a text, and the tokenizer of {checkpoint.name} cannot be loaded ({reason[:200]}); save it again"
        ) from error
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ConversionError(f"calibrate: {name} holds no token that the tokenizer of {checkpoint.name} knows")
    return list(ids), list(blank)


@contextlib.contextmanager
def _telling(calibration: Calibration) -> Iterator[None]:
    """Tell a person who waits at a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"calibrating on {calibration.tokens:,} tokens"):
        yield
