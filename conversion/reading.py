"""A dense checkpoint that is read on texts, and the plan by layer that is chosen on them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.conversion.comparison import load, read
from hf_sparse.conversion.layer_plan import LayerPlan, candidates, check_budget, choose, layer_key
from hf_sparse.conversion.progress import counting
from hf_sparse.conversion.source import Checkpoint, open_checkpoint
from hf_sparse.conversion.target import Target, plan_target
from hf_sparse.conversion.texts import Texts, read_texts
from hf_sparse.errors import ConversionError
from hf_sparse.integration.kept import noting_kept
from hf_sparse.patterns import Band

# pieces of texts that are read: every other one chooses a plan, and where there is one the rest judge it
MOST_PIECES = 16
# longest piece, where nothing else is asked for
_MOST_LENGTH = 2048


@dataclass(frozen=True, eq=False)
class Reading:
    """A dense checkpoint and the pieces of text it is read on.

    Attributes:
        checkpoint: the source.
        target: what it becomes under a band of single tokens: for its layers and its length.
        texts: as tokens of its tokenizer.
        length: tokens of a piece, special ones included.
        pieces: int64 ``[1, length]`` each.
    """

    checkpoint: Checkpoint
    target: Target
    texts: Texts
    length: int
    pieces: tuple[Tensor, ...]

    def load_dense(self) -> tuple[Any, bool]:
        """Return the dense model, and whether the checkpoint holds all its weights."""
        return load(self.target.dense_class, self.checkpoint.folder, self.target.dense_config)


def open_reading(
    source: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    *,
    length: int | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Reading:
    """Open a checkpoint and texts; arguments and errors as for :func:`hf_sparse.plan_layers`."""
    checkpoint = open_checkpoint(source, revision=revision, token=token, allow_pickle=allow_pickle)
    checkpoint.check_dense("what reads texts")
    target = plan_target(checkpoint, Band(radius=0), max_length=max_length)
    if target.image_size is not None:
        raise ConversionError(f"texts are read, and {checkpoint.name} reads images; leave them out")
    most = target.length_before
    if length is None:
        length = min(most, _MOST_LENGTH)
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= most:
        raise ValueError(f"length must be from 1 to the {most:,} tokens that {checkpoint.name} reads, got {length!r}")
    held = read_texts(texts, checkpoint)
    return Reading(checkpoint, target, held, length, held.pieces(length, MOST_PIECES))


def plan_layers(
    source: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    density: float,
    *,
    length: int | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> LayerPlan:
    """Choose a plan by layer; see :func:`hf_sparse.plan_layers`."""
    check_budget(density)
    hub: dict[str, Any] = {"revision": revision, "token": token, "allow_pickle": allow_pickle}
    reading = open_reading(source, texts, length=length, max_length=max_length, **hub)
    return plan_on(reading, reading.load_dense()[0], reading.pieces[::2], density)


def plan_on(reading: Reading, dense: Any, pieces: Sequence[Tensor], density: float) -> LayerPlan:
    """Choose a plan by layer on pieces of text.

    Args:
        reading: says which layers there are.
        dense: the dense model.
        pieces: int64 ``[1, length]`` each.
        density: mean over layers, at the most.

    Raises:
        ValueError: if no choice is as sparse.
    """
    layers, length = reading.target.layers, reading.length
    options = {layer_key(layer): candidates(layer, density, length, reading.target.length) for layer in layers}
    sums = {name: torch.zeros(len(held), dtype=torch.float64) for name, held in options.items()}
    with counting(len(pieces), None, doing="choosing a plan") as count:
        for row in pieces:
            with noting_kept(dense, options) as kept:
                read(dense, row)
            for name, shares in kept.shares.items():
                sums[name] += shares.mean(1)
            count(1)
    kept_by = [(sums[name] / len(pieces)).tolist() for name in options]
    return choose(layers, list(options.values()), kept_by, budget=density, length=length, texts=len(pieces))
