"""What every task has in common: which columns it reads, its head, its batches, and how it is judged."""

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from hf_sparse.errors import FailedRunError, RecipeError
from hf_sparse.integration.entry import read_entry
from hf_sparse.integration.sentences import sentence_ids
from hf_sparse.patterns import Pattern
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.order import OrderedTrainer
from hf_sparse.recipes.reading import Reading, pad


class Task:
    """One kind of thing to learn.

    Attributes:
        best: the metric that chooses the best epoch.
        is_larger_better: whether that one is.
        counts_tokens: whether the trainer divides a sum over tokens by their number in a whole step.
        labels: names of the fields of a batch that are no input.
        auto: the Auto class of the head.
        trainer: the trainer.
        settings: the class of its arguments.
        more: of these.
        baselines: how a dense model may read, beside.
        truncated: what tables call a dense model, given the tokens it reads.
        judges_before: whether the model is judged before training, too.
        made: names of the parameters of the model loaded last that its checkpoint does not have.

    Args:
        splits: of the dataset.
        arguments: name the columns.
    """

    best: str
    is_larger_better: ClassVar[bool] = True
    counts_tokens: ClassVar[bool] = False
    labels: ClassVar[tuple[str, ...]] = ("labels",)
    auto: Any
    trainer: ClassVar[type[Trainer]] = OrderedTrainer
    settings: ClassVar[type[TrainingArguments]] = TrainingArguments
    more: ClassVar[Mapping[str, Any]] = {}
    baselines: ClassVar[tuple[str, ...]] = ("truncated", "chunks")
    truncated: ClassVar[str] = "dense, the first {} tokens"
    judges_before: ClassVar[bool] = False

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        self.arguments = arguments
        self.made: frozenset[str] = frozenset()

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        """Return the columns that a split has to have."""
        raise NotImplementedError

    @classmethod
    def title_of_truncated(cls, arguments: RecipeArguments, tokens: int) -> str:
        """Return what tables call a dense model that reads so many tokens."""
        return cls.truncated.format(tokens)

    @classmethod
    def processor(cls, source: str) -> Any:
        """Return what makes a checkpoint's input of documents: its tokenizer."""
        tokenizer = AutoTokenizer.from_pretrained(source)
        # rows begin with their first token, whatever the tokenizer would do for generation
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, source: str, **settings: Any) -> PreTrainedModel:
        """Return a checkpoint with the task's head.

        Args:
            source: the checkpoint.
            settings: of ``from_pretrained``.

        Raises:
            RecipeError: if its model type has no such head.
        """
        found: PreTrainedModel
        try:
            found, told = self.auto.from_pretrained(source, output_loading_info=True, **settings)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise RecipeError(
                f"{source} is of a model type that {self.auto.__name__} does not know; name a checkpoint of one that it does"
            ) from error
        self.made = frozenset({*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])})
        return found

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        """Return a split as a model reads it.

        Args:
            split: of the dataset.
            kind: "train", "validation" or "test".
            tokenizer: of the model.
            reading: how the model reads documents.

        Raises:
            RecipeError: if a document is too long, or something in it does not fit.
        """
        raise NotImplementedError

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        """Return a batch of rows, padded; each of their fields has a number for each token."""
        fills = {"input_ids": tokenizer.pad_token_id, "labels": -100, "document_ids": -1}
        return pad(rows, reading.multiple, fills)

    def finish(self, batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
        """Return a batch with what follows from the rest of it, such as labels."""
        return batch

    def collator(self, tokenizer: Any, model: PreTrainedModel, reading: Reading) -> Any:
        """Return what makes a batch, with what the model's pattern reads beside tokens, so that nobody can forget it.

        Global are the tokens that rows say, else the first of each document. Segments are sentences.
        """
        patterns = patterns_of(model)
        has_marks = any(pattern.has_global_tokens for pattern in patterns)
        segmented = next((pattern for pattern in patterns if pattern.takes_segments), None)
        closed = model.__dict__.get("_sparse_closed") if patterns else None
        if closed is not None and (has_marks or segmented is not None):
            raise RecipeError(
                f"{type(model).__name__} cannot be told which tokens are global: {closed} of transformers passes nothing on; "
                "convert it with a pattern that has none, such as band"
            )

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = self.collate(rows, tokenizer, reading)
            if not patterns:
                batch.pop("document_ids", None)
            if not has_marks:
                batch.pop("global_attention_mask", None)
            elif "global_attention_mask" not in batch:
                real = batch["attention_mask"]
                marks = torch.zeros_like(real).scatter(1, real.argmax(1, keepdim=True), 1)
                if "document_ids" in batch:
                    begins = torch.nn.functional.pad(batch["document_ids"].diff(dim=1) != 0, (1, 0), value=True)
                    marks = (begins & (real != 0)).to(real.dtype)
                batch["global_attention_mask"] = marks
            if segmented is not None:
                # of documents, and of what is asked of them
                for name in [name for name in batch if name.endswith("input_ids")]:
                    ids = sentence_ids(batch[name], tokenizer, most=segmented.num_nodes(batch[name].shape[1]))
                    batch[name.replace("input_ids", "segment_ids")] = ids
            return self.finish(batch, tokenizer)

        return collate

    def prepare(self, trainer: Any) -> None:
        """Give a trainer what else it needs."""

    def reduce(self, logits: Any, labels: Any) -> Any:
        """Return what is kept of the logits of a batch for ``metrics``."""
        return logits

    def choose(self, predictions: Any, labels: np.ndarray) -> None:
        """Choose what is chosen on the validation split, such as a threshold."""

    def metrics(self, predictions: Any, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return the metrics of what was predicted for a split, in its order."""
        raise NotImplementedError

    def scores(self, name: str, predictions: Any, references: Any, **settings: Any) -> dict[str, float]:
        """Return one of our metrics, and the numbers of the one that was asked for beside it, called after it.

        Args:
            name: of ours.
            predictions: of both.
            references: of both.
            settings: of ours.

        Raises:
            FailedRunError: if the one that was asked for cannot be computed of them.
        """
        found = dict(load_metric(name, **settings).compute(predictions=predictions, references=references))
        if self.arguments.metric is None:
            return found
        metric = load_metric(self.arguments.metric)
        try:
            more = metric.compute(predictions=predictions, references=references)
        # what a script of others does not like comes as anything
        except Exception as error:
            raise FailedRunError(
                f"--metric {self.arguments.metric} cannot be computed of what this task gives it "
                f"({type(error).__name__}: {error})"
            ) from error
        own = Path(self.arguments.metric).stem
        return {**found, **{f"{own}_{key}": float(value) for key, value in more.items() if isinstance(value, Real)}}

    def details(self) -> dict[str, Any]:
        """Return what else is to be known of a run."""
        return {}


def patterns_of(model: PreTrainedModel) -> list[Pattern]:
    """Return the patterns of a model; none of a dense one."""
    if getattr(model.config, "sparse_attention", None) is None:
        return []
    entry = read_entry(model.config)
    return [pattern for pattern in (entry.pattern, *(held for _, held in entry.layers)) if pattern is not None]


def without_pooler(model: Any) -> Any:
    """Return a model whose pooler is not trained: nothing reads it, and several processes would wait for its gradients."""
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    return model


def names_of(feature: Any) -> list[str] | None:
    """Return the names that a column's numbers stand for; None where it holds no numbers of names."""
    own = getattr(feature, "feature", feature)
    return list(own.names) if isinstance(own, ClassLabel) else None


def encoded(split: Any, rows: Any) -> Any:
    """Return a split, or a stream of one, in which ``rows`` made lists of fields out of lists of columns."""
    if isinstance(split, Dataset):
        return split.map(rows, batched=True, remove_columns=split.column_names, desc="Reading documents")
    # of a stream the names may not be known before it is read
    return split.map(rows, batched=True, remove_columns=split.column_names or list(next(iter(split))))


def listed(rows: list[dict[str, Any]], names: tuple[str, ...] = ()) -> dict[str, list[Any]]:
    """Return rows as lists of fields: what a model reads of what ``tokenize`` gave, and those named."""
    left_out = {"offset_mapping", "word_ids", "sequence_ids"} - set(names)
    return {name: [row[name] for row in rows] for name in rows[0] if name not in left_out}
