"""Does a sparse class of transformers' own say what ours says with the same pattern?"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import AutoConfig

from hf_sparse.conversion.in_tree import KIN
from hf_sparse.conversion.verify import largest_difference, outputs, quietly, random_texts
from hf_sparse.integration.families import family_of
from hf_sparse.patterns import BigBird, Pattern


def in_tree_difference(
    theirs: tuple[Any, Path], ours: tuple[Any, Path, Any], pattern: Pattern
) -> tuple[float | None, str]:
    """Compare a sparse checkpoint of transformers' own with one of ours.

    A batch of two random texts, one of them padded, is read by both in float32, their first tokens global where the pattern has
    such. BigBird reads in training mode, without dropout: in evaluation it has no random blocks. Where our blocks lie over the
    real tokens and its over the padded length, one text without padding is read.

    Args:
        theirs: class and folder.
        ours: class, folder and config.
        pattern: of our layers, whose attention is to be that of theirs.

    Returns:
        The largest absolute difference, or None where theirs attends fully to all that ours reads; and what was done, in words.

    Raises:
        UnfinishedConversionError: if the two differ by more than rounding.
    """
    cls, folder = theirs
    config = AutoConfig.from_pretrained(folder)
    kin = KIN[config.model_type]
    tokens = min(kin.compared_tokens(config), family_of(ours[2]).length(ours[2]))
    if tokens <= kin.shortest(config):
        return None, f"not compared: up to {kin.shortest(config):,} tokens {cls.__name__} attends fully"
    for field in [name for name in config.to_dict() if "dropout" in name]:
        setattr(config, field, 0.0)
    given = random_texts(ours[2], tokens)
    if pattern.has_global_tokens:
        given["global_attention_mask"] = torch.zeros_like(given["input_ids"])
        given["global_attention_mask"][:, :2] = 1
    if isinstance(pattern, BigBird) and pattern.length == "real":
        given = {name: value[:1] for name, value in given.items()}
    is_training = isinstance(pattern, BigBird) and pattern.random_plan != "evaluation"
    with quietly(), torch.random.fork_rng(devices=[]), _numpy_kept():
        want, is_whole = outputs(cls, folder, config, given, is_training=is_training)
        got, _ = outputs(ours[0], ours[1], copy.deepcopy(ours[2]), given)
    names, largest = largest_difference(want, got, is_whole=is_whole, how="with the same pattern")
    mode = " in training mode" if is_training else ""
    count = "2 texts" if len(given["input_ids"]) > 1 else "a text"
    return largest, f"{' and '.join(names)} of {cls.__name__}{mode} on {count} of up to {tokens} tokens, float32"


@contextlib.contextmanager
def _numpy_kept() -> Iterator[None]:
    """Keep numpy's generator as it is: BigBird seeds it to draw its blocks."""
    held = numpy.random.get_state()
    try:
        yield
    finally:
        numpy.random.set_state(held)
