"""Losses that go with a pattern, added to the loss of any task."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.cpc import cpc_loss
from hf_sparse.recipes.policy import PolicyLoss

Added = Callable[[Any, dict[str, Any], Tensor], Tensor]


def added_losses(model: Any, arguments: RecipeArguments, tokenizer: Any) -> list[Added]:
    """Return the losses that arguments switch on; each takes the model, a batch and the loss of the task.

    Raises:
        RecipeError: if the model's pattern has no use for one of them.
    """
    found: list[Added] = []
    if arguments.policy:
        try:
            policy = PolicyLoss(model)
        except ValueError as error:
            raise RecipeError(f"--policy needs a model with the pattern sac: {error}") from error
        found.append(lambda _model, _batch, loss: arguments.policy * policy(-loss.detach()))
    if arguments.cpc:
        if not _has_given_segments(model):
            raise RecipeError("--cpc needs a model with the pattern etc and segments='given'")
        found.append(
            lambda model, batch, _loss: (
                arguments.cpc
                * cpc_loss(
                    model,
                    batch["input_ids"],
                    batch["segment_ids"],
                    mask_token_id=tokenizer.mask_token_id,
                    attention_mask=batch["attention_mask"],
                )
            )
        )
    return found


def _has_given_segments(model: Any) -> bool:
    nodes = getattr(model.base_model, "sparse_nodes", None)
    return nodes is not None and bool(nodes.pattern.takes_segments)
