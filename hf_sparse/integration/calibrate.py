"""Calibration: centroids go to where a model's queries and keys are, before any training."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_sparse.patterns.routing import Centroids


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
    """
    states = [module for module in model.modules() if isinstance(module, Centroids)]
    held = list(batches)
    if not states:
        raise ValueError(f"{type(model).__name__} has no centroids: none of its layers has the pattern 'routing'")
    if not held:
        raise ValueError("calibration needs at least one batch")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
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
            for state in states:
                state.adopt(len(held))
    finally:
        for state in states:
            state.is_calibrating = False
        model.train(was_training)
    return model
