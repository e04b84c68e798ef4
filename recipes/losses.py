"""Losses that go with a pattern, added to the loss of any task."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.cpc import cpc_loss
from hf_sparse.recipes.policy import PolicyLoss

Added = Callable[[dict[str, Any], Tensor], Tensor]


def added_losses(model: Any, arguments: RecipeArguments, tokenizer: Any) -> list[Added]:
    """Return the losses that arguments switch on; each takes a batch and the mean loss of the task.

    They run the model as it is given here, whatever adapters or processes wrap around it later.

    Raises:
        RecipeError: if the model's pattern has no use for one of them.
    """
    found: list[Added] = []
    if arguments.policy:
        try:
            policy = PolicyLoss(model)
        except ValueError as error:
            raise RecipeError(f"--policy needs a model with the pattern sac: {error}") from error
        found.append(lambda _batch, loss: arguments.policy * policy(-loss.detach()))
    if arguments.cpc:
        if not _has_given_segments(model):
            raise RecipeError("--cpc needs a model with the pattern etc and segments='given'")
        found.append(lambda batch, loss: arguments.cpc * _cpc(model, batch, loss, tokenizer.mask_token_id))
    return found


def _cpc(model: Any, batch: dict[str, Tensor], loss: Tensor, mask: int) -> Tensor:
    """Return the loss of segments; 0 for a batch with a single one, which has nothing to be told from."""
    ids, real, documents = batch["segment_ids"], batch["attention_mask"] != 0, batch.get("document_ids")
    begins = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0), value=True) & real & (ids >= 0)
    if begins.sum() < 2:
        return torch.zeros_like(loss)
    return cpc_loss(
        model,
        batch["input_ids"],
        ids,
        mask_token_id=mask,
        attention_mask=batch["attention_mask"],
        document_ids=documents,
    )


def _has_given_segments(model: Any) -> bool:
    nodes = getattr(model.base_model, "sparse_nodes", None)
    return nodes is not None and bool(nodes.pattern.takes_segments)
