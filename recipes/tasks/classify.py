"""Document classification, with one label or several for each document."""

from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, EvalPrediction, PreTrainedModel

from hf_sparse.errors import RecipeError
from hf_sparse.integration.entry import read_entry
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics import load_metric

# candidates for the probability from which on a label is given, on the validation split
THRESHOLDS = tuple(step / 50 for step in range(1, 50))


class Classification:
    """The labels of a dataset, and what training and judging a classifier of them takes.

    A document with a list of labels may have any number of them; with a single one it has that.

    Attributes:
        labels: their names, in order.
        is_multilabel: whether a document has a list of them.
        best: the metric that chooses the best epoch.

    Args:
        splits: of the dataset.
        arguments: name the columns.

    Raises:
        RecipeError: if labels cannot be told, or a split has one that the training split has not.
    """

    best = "f1_macro"

    def __init__(self, splits: dict[str, Dataset], arguments: RecipeArguments) -> None:
        self._arguments, column = arguments, arguments.label_column
        feature = splits["train"].features[column]
        own = getattr(feature, "feature", feature)
        self.is_multilabel = own is not feature
        names = own.names if isinstance(own, ClassLabel) else None
        held = {kind: _flat(split[column], self.is_multilabel) for kind, split in splits.items()}
        self.labels = names or sorted(held["train"], key=lambda one: (isinstance(one, str), one))
        self._index = {one: i for i, one in enumerate(range(len(names)) if names else self.labels)}
        for kind, found in held.items():
            if unseen := sorted(map(repr, found - set(self._index))):
                raise RecipeError(
                    f"the {kind} split has labels that the training split has not: {', '.join(unseen[:5])}; leave those "
                    "documents out, or add some to the training split"
                )
        if len(self.labels) < (1 if self.is_multilabel else 2):
            raise RecipeError(f"column {column!r} of the training split has no two different labels to tell apart")
        self.threshold = 0.5

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        """Return the columns that a split has to have."""
        return arguments.text_column, arguments.label_column

    def load(self, source: str) -> PreTrainedModel:
        """Return a checkpoint with a head for the labels."""
        names = {i: str(name) for i, name in enumerate(self.labels)}
        found: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            problem_type="multi_label_classification" if self.is_multilabel else "single_label_classification",
        )
        return found

    def encode(self, split: Dataset, tokenizer: Any, longest: int) -> Dataset:
        """Return a split as token ids and labels.

        Raises:
            RecipeError: if a document is longer than ``longest`` tokens and is not to be cut off.
        """
        arguments = self._arguments

        def encoded(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = rows[arguments.text_column]
            ids = tokenizer(
                texts, truncation=arguments.truncate, max_length=longest if arguments.truncate else None, verbose=False
            )
            for text, one in zip(texts, ids["input_ids"], strict=True):
                if len(one) > longest:
                    raise RecipeError(
                        f"a document has {len(one)} tokens, more than {longest}: pass --truncate to cut such off, or convert "
                        f"the model with a larger --max-length; it begins {' '.join(text.split())[:40]!r}"
                    )
            return {**ids, "labels": [self._numbers(label) for label in rows[arguments.label_column]]}

        return split.map(encoded, batched=True, remove_columns=split.column_names, desc="Reading documents")

    def collator(self, tokenizer: Any, model: PreTrainedModel) -> Any:
        """Return what makes a batch: padding, and the first token of each document global where the pattern has such."""
        pad = DataCollatorWithPadding(tokenizer)
        entry = read_entry(model.config)
        patterns = [entry.pattern, *(pattern for _, pattern in entry.layers)]
        marks = any(pattern is not None and pattern.has_global_tokens for pattern in patterns)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            labels = torch.tensor([row["labels"] for row in rows])
            batch = dict(pad([{name: row[name] for name in row if name != "labels"} for row in rows]))
            batch["labels"] = labels.float() if self.is_multilabel else labels
            if marks:
                real = batch["attention_mask"]
                first = real.int().argmax(1, keepdim=True)
                batch["global_attention_mask"] = torch.zeros_like(real).scatter(1, first, 1)
            return batch

        return collate

    def choose(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Choose the threshold that gives the largest micro F1, on the validation split; for single labels nothing."""
        if self.is_multilabel:
            chances = _chances(logits)
            self.threshold = max(THRESHOLDS, key=lambda at: _micro_f1(chances >= at, labels > 0.5))

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics of logits ``[documents, labels]``."""
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        if not self.is_multilabel:
            said = logits.argmax(1)
            found = load_metric("accuracy").compute(predictions=said, references=labels)
            return {**found, **load_metric("f1").compute(predictions=said, references=labels)}
        said = (_chances(logits) >= self.threshold).astype(int)
        found = load_metric("f1", config_name="multilabel").compute(predictions=said, references=labels.astype(int))
        return dict(found)

    def _numbers(self, label: Any) -> Any:
        if not self.is_multilabel:
            return self._index[label]
        given = {self._index[one] for one in label}
        return [float(i in given) for i in range(len(self.labels))]


def _flat(labels: Any, is_multilabel: bool) -> set[Any]:
    """Return the different labels of a column."""
    return {one for label in labels for one in label} if is_multilabel else set(labels)


def _chances(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _micro_f1(said: np.ndarray, there: np.ndarray) -> float:
    total = said.sum() + there.sum()
    return float(2 * (said & there).sum() / total) if total else 0.0
