"""Training by the mean over the tokens of a step: of tags, words left out, next words, and summaries."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse.recipes.order import OrderedTrainer
from hf_sparse.recipes.processes import count_processes

# of a token that nothing is to be said of
NO_LABEL = -100


class TokenTrainer(OrderedTrainer):
    """Trains by the mean over all labelled tokens of a step, in however many batches and on however many processes they lie.

    Most heads give the mean of a batch whatever they are told of the step, and ``Trainer`` would take it for a share of it.

    Attributes:
        is_shifted: whether a token's label is the next token's.
        keeps_labels: whether the model is given the labels, too.
    """

    is_shifted: ClassVar[bool] = False
    keeps_labels: ClassVar[bool] = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step, and how many labelled tokens all processes have in it."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        batches = [self.labelled(batch) for batch in batches]
        count = torch.stack([(self._wanted(batch["labels"]) != NO_LABEL).sum() for batch in batches]).sum()
        return batches, self.accelerator.reduce(count.to(device))

    def labelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch of training with its labels."""
        return batch

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        held = {name: value for name, value in inputs.items() if name != "labels" or self.keeps_labels}
        outputs = model(**held)
        logits, wanted = outputs["logits"], self._wanted(labels)
        if self.is_shifted:
            logits = logits[:, :-1]
        total = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=NO_LABEL, reduction="sum"
        )
        if num_items_in_batch is None or not model.training:
            # what is judged is this batch alone
            loss = total / (wanted != NO_LABEL).sum().clamp(min=1)
        else:
            # gradients are averaged over processes, and each has a part of the sum
            loss = count_processes() * total / num_items_in_batch.clamp(min=1)
        return (loss, {**outputs, "loss": loss}) if return_outputs else loss

    def _wanted(self, labels: Tensor) -> Tensor:
        return labels[:, 1:] if self.is_shifted else labels


class NextTokenTrainer(TokenTrainer):
    """Trains by the mean over all next tokens of a step."""

    is_shifted = True
