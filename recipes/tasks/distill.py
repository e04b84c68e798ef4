"""Distillation: a sparse model learns to say what the dense one says that it was converted from."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
)

from hf_sparse.errors import RecipeError
from hf_sparse.integration.families import family_of
from hf_sparse.integration.layers import self_attention_modules
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.order import OrderedTrainer
from hf_sparse.recipes.processes import mean_of_all
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.parent import Task, encoded, without_pooler

# heads whose logits are compared; without one, how near tokens are to one another
_HEADS = {"ForMaskedLM": AutoModelForMaskedLM, "ForCausalLM": AutoModelForCausalLM}
# tokens of a row whose nearness to all others is compared
_PICKED = 256


@dataclass(frozen=True)
class Said:
    """What a model says of tokens.

    Attributes:
        logits: float ``[B, N, V]``; of a model without a head its last hidden states.
        hidden: of every layer, ``[B, N, D]``.
        attention: what every self-attention module returns, ``[B, N, D]``.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...]
    attention: tuple[Tensor, ...]

    def fields(self) -> tuple[Tensor, ...]:
        """Return all of them in one row."""
        return (self.logits, *self.hidden, *self.attention)


class DistillationTrainer(OrderedTrainer):
    """Trains a model on the divergence from another, which is set as ``task`` has prepared it."""

    teacher: Any
    task: "Distillation"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        steps = self.args.max_steps if self.args.max_steps > 0 else self.state.max_steps
        is_short = self.state.global_step < self.task.arguments.short_share * steps
        held = self.task.shortened(inputs) if is_short else inputs
        loss = self.task.loss(model, self.teacher, held)
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return, for each row, the divergence within the dense length and of the whole row, and of how many tokens."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            found = torch.cat(
                [self.task.divergence(model, self.teacher, held) for held in (self.task.shortened(inputs), inputs)], 1
            )
        loss = found[:, 0].sum() / found[:, 1].sum().clamp(min=1)
        return loss, found, torch.zeros(len(found), device=found.device)


class Distillation(Task):
    """The Kullback-Leibler divergence of a sparse model's logits from a dense one's, token by token.

    A model without a head is compared in how near each token is to every other of its row: the softmax of the scaled products
    of last hidden states. In the first share of the steps rows are cut at the dense model's length. After it they are whole,
    and the dense model reads them in parts of its length.

    Source: relations of hidden states after Wang et al. 2020, arXiv:2002.10957, who compare those of values.
    """

    is_larger_better = False
    labels = ()
    trainer = DistillationTrainer
    baselines = ()
    judges_before = True

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        if arguments.teacher is None:
            raise RecipeError("distill needs the dense checkpoint that the model was converted from: --teacher")
        config = AutoConfig.from_pretrained(arguments.teacher)
        if getattr(config, "sparse_attention", None) is not None:
            raise RecipeError(f"--teacher names {arguments.teacher}, which is sparse; name the dense checkpoint")
        mine = AutoConfig.from_pretrained(arguments.model)
        fields = ("vocab_size", *(("hidden_size",) if arguments.hidden or arguments.attention else ()))
        for field in fields:
            if getattr(mine, field, None) != getattr(config, field, None):
                raise RecipeError(
                    f"--teacher names {arguments.teacher}, whose {field} is {getattr(config, field, None)} and not "
                    f"{getattr(mine, field, None)}; name the dense checkpoint that {arguments.model} was converted from"
                )
        self._length = family_of(config).length(config)
        named = next(iter(config.architectures or ()), "")
        self.auto = next((auto for ending, auto in _HEADS.items() if named.endswith(ending)), AutoModel)
        self._has_head = self.auto is not AutoModel
        self._edges: tuple[int | None, int | None] = (None, None)
        # of whole rows, unless none are trained on
        self.best = "kl_long" if arguments.short_share < 1 else "kl"

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return (arguments.text_column or "text",)

    def load(self, source: str, **settings: Any) -> Any:
        return without_pooler(super().load(source, **settings))

    def prepare(self, trainer: Any) -> None:
        trainer.task = self
        trainer.teacher = self.load(self.arguments.teacher or "").to(trainer.args.device).eval()

    def encode(self, split: Any, kind: str, tokenizer: Any, reading: Reading) -> Any:
        (text,) = self.columns(self.arguments)
        self._edges = (tokenizer.cls_token_id, tokenizer.sep_token_id)

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = tokenizer(
                [one for one in held[text] if one and one.strip()] or [" "],
                truncation=True,
                max_length=reading.longest,
                return_overflowing_tokens=True,
                verbose=False,
            )
            return {name: found[name] for name in ("input_ids", "attention_mask")}

        return encoded(split, rows)

    def shortened(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a batch whose rows are cut at the dense model's length."""
        return {name: held[:, : self._length] for name, held in batch.items()}

    def loss(self, model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the divergence of a batch, and what is added of hidden states and attention outputs."""
        arguments = self.arguments
        mine, theirs, real = self._both(model, teacher, batch)
        found = self._divergences(mine.logits, theirs.logits, real)
        loss = mean_of_all(found.sum(), real.sum(), is_training=model.training)
        for weight, pairs in (
            (arguments.hidden, zip(mine.hidden, theirs.hidden, strict=True)),
            (arguments.attention, zip(mine.attention, theirs.attention, strict=True)),
        ):
            if weight:
                errors = [(one[real] - other[real]).square().mean() / other[real].var() for one, other in pairs]
                loss = loss + weight * torch.stack(errors).mean()
        return loss

    def divergence(self, model: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum of divergences of each row's tokens, and their number, ``[B, 2]``."""
        mine, theirs, real = self._both(model, teacher, batch)
        found = self._divergences(mine.logits, theirs.logits, real)
        return torch.stack([found.sum(1), real.sum(1).to(found.dtype)], 1)

    def metrics(self, predictions: np.ndarray, labels: Any, kind: str) -> dict[str, float]:
        """Return the mean divergence of a token in nats, within the dense length and of whole rows."""
        short, short_count, long, long_count = predictions.sum(0)
        return {"kl": float(short / short_count), "kl_long": float(long / long_count)}

    def _both(self, model: Any, teacher: Any, batch: dict[str, Tensor]) -> tuple[Said, Said, Tensor]:
        """Return what both say, and which tokens they can be compared in, bool ``[B, N]``."""
        wanted = (bool(self.arguments.hidden), bool(self.arguments.attention))
        mine = self._say(model, batch, *wanted)
        with torch.no_grad():
            held = {name: batch[name] for name in ("input_ids", "attention_mask")}
            if batch["input_ids"].shape[1] <= self._length:
                return mine, self._say(teacher, held, *wanted), batch["attention_mask"] != 0
            theirs, is_read = self._in_parts(teacher, held, *wanted)
        return mine, theirs, is_read

    def _say(self, model: Any, batch: dict[str, Tensor], needs_hidden: bool, needs_attention: bool) -> Said:
        with _attention_outputs(model, needs_attention) as attention:
            found = model(**batch, output_hidden_states=needs_hidden, return_dict=True)
        logits = found.logits if self._has_head else found.last_hidden_state
        return Said(logits, tuple(found.hidden_states[1:]) if needs_hidden else (), tuple(attention))

    def _in_parts(
        self, teacher: Any, batch: dict[str, Tensor], needs_hidden: bool, needs_attention: bool
    ) -> tuple[Said, Tensor]:
        """Return what a dense model says of long rows, read in parts between special tokens of their own."""
        ids, real = batch["input_ids"], batch["attention_mask"] != 0
        first, last = self._edges
        room = self._length - (first is not None) - (last is not None)
        # special tokens at the ends of a row are put around every part anew
        is_read = real.clone()
        for edge in self._edges:
            if edge is not None:
                is_read &= ids != edge
        rows = [(row, at) for row, held in enumerate(is_read) for at in held.nonzero()[:, 0].split(room) if len(at)]
        parts = [
            torch.cat(
                [
                    ids.new_tensor([] if first is None else [first]),
                    ids[row, at],
                    ids.new_tensor([] if last is None else [last]),
                ]
            )
            for row, at in rows
        ]
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        lengths = torch.tensor([len(part) for part in parts], device=ids.device)
        mask = (torch.arange(padded.shape[1], device=ids.device) < lengths[:, None]).long()
        said = self._say(teacher, {"input_ids": padded, "attention_mask": mask}, needs_hidden, needs_attention)
        skip = int(first is not None)

        def whole(held: Tensor) -> Tensor:
            found = held.new_zeros(*ids.shape, held.shape[2])
            for i, (row, at) in enumerate(rows):
                found[row, at] = held[i, skip : skip + len(at)]
            return found

        return Said(whole(said.logits), tuple(map(whole, said.hidden)), tuple(map(whole, said.attention))), is_read

    def _divergences(self, mine: Tensor, theirs: Tensor, real: Tensor) -> Tensor:
        """Return the divergence at each token, float ``[B, N]``, 0 where there is nothing to compare."""
        share: Tensor | float = 1.0
        if not self._has_head:
            mine, theirs, real, share = _relations(mine, theirs, real)
        found = torch.nn.functional.kl_div(
            mine.float().log_softmax(-1), theirs.float().log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        return found.masked_fill(~real, 0.0) * share


def _relations(mine: Tensor, theirs: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scores of some tokens against all of their row, which are real, and what makes sums those over all tokens."""
    step = -(-mine.shape[1] // _PICKED)
    scale = 1 / math.sqrt(mine.shape[2])
    least = torch.finfo(torch.float32).min
    scores = [
        (scale * held[:, ::step].float() @ held.float().transpose(1, 2)).masked_fill(~real[:, None], least)
        for held in (mine, theirs)
    ]
    picked = real[:, ::step]
    share = real.sum(1, keepdim=True) / picked.sum(1, keepdim=True).clamp(min=1)
    return scores[0], scores[1], picked, share


@contextmanager
def _attention_outputs(model: PreTrainedModel, is_wanted: bool) -> Iterator[list[Tensor]]:
    """Collect what self-attention modules return."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    modules = self_attention_modules(model) if is_wanted else []
    hooks = [module.register_forward_hook(keep) for *_, module in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
