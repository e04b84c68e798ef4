"""Calibration: centroids go to where a model's queries and keys are, before any training."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.patterns.parent import check_count
from hf_sparse.patterns.routing import Centroids


def checked_batches(batches: Iterable[Mapping[str, Tensor]], what: str) -> list[Mapping[str, Tensor]]:
    """Return the batches that something, named for its errors, is done on, as a list.

    Raises:
        ValueError: if there are none.
        TypeError: if one is not what a model is called with.
    """
    held = [batches] if isinstance(batches, Mapping) else list(batches)
    for batch in held:
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch is a mapping such as a tokenizer returns, got {type(batch).__name__}")
    if not held:
        raise ValueError(f"{what} needs at least one batch")
    return held


def calibrate_(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, iterations: int = 5
) -> PreTrainedModel:
    """Move the centroids of a model's ``routing`` layers to the queries and keys that it has on some texts, in place.

    Each iteration is one of Lloyd's algorithm on unit vectors: all batches are read, then every centroid goes to the mean
    direction of the queries and keys that were nearest to it. Save the model afterwards. A checkpoint that was converted has
    random directions until this is done or it is trained.

    Args:
        model: a sparse model with the pattern ``routing``, on its own or in a combination.
        batches: what the model is called with; read into a list.
        iterations: at least 1.

    Returns:
        The same model, in the mode it was in.

    Raises:
        ValueError: if the model has no centroids, or there is nothing to read.
        TypeError: if a batch is not what a model is called with, or ``iterations`` is no int.
    """
    states = [module for module in model.modules() if isinstance(module, Centroids)]
    held = checked_batches(batches, "calibration")
    if not states:
        raise ValueError(f"{type(model).__name__} has no centroids: none of its layers has the pattern 'routing'")
    check_count(iterations, "iterations", least=1)
    was_training = model.training
    model.eval()
    try:
        for state in states:
            state.is_calibrating = True
            state.new_sums.zero_()
        for _ in range(iterations):
            with torch.no_grad():
                for batch in held:
                    model(**batch)
            if not any(state.new_sums.any() for state in states):
                raise ValueError("calibration needs texts: the batches hold no tokens")
            for state in states:
                state.adopt(len(held))
    finally:
        for state in states:
            state.is_calibrating = False
        model.train(was_training)
    return model
