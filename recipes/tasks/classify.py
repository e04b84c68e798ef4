"""Document classification, with one label or several for each document."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.reading import Reading, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed, names_of

# candidates for the probability from which on a label is given, on the validation split
THRESHOLDS = tuple(step / 50 for step in range(1, 50))


class Classification(Task):
    """The labels of a dataset, and what training and judging a classifier of them takes.

    A document with a list of labels may have any number of them; with a single one it has that.

    Attributes:
        names: of the labels, in order.
        is_multilabel: whether a document has a list of them.
        threshold: the probability from which on a document has one of several labels.

    Args:
        splits: of the dataset.
        arguments: name the columns.

    Raises:
        RecipeError: if labels cannot be told, or a split has one that the training split has not.
    """

    best = "f1_macro"

    auto: Any = AutoModelForSequenceClassification

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        column = self.columns(arguments)[1]
        feature = splits["train"].features[column]
        self.is_multilabel = getattr(feature, "feature", feature) is not feature
        # splits may number the same names in other ways
        self._named = {kind: names_of(split.features[column]) for kind, split in splits.items()}
        held = {kind: self._found(split[column], kind) for kind, split in splits.items()}
        self.names: list[Any] = self._named["train"] or sorted(
            held["train"], key=lambda one: (isinstance(one, str), one)
        )
        self._index = {one: i for i, one in enumerate(self.names)}
        for kind, found in held.items():
            if unseen := sorted(map(repr, found - held["train"])):
                raise RecipeError(
                    f"the {kind} split has labels that the training split has not: {', '.join(unseen[:5])}; leave those "
                    "documents out, or add some to the training split"
                )
        if len(self.names) < (1 if self.is_multilabel else 2):
            raise RecipeError(f"column {column!r} of the training split has no two different labels to tell apart")
        self.threshold = 0.5
        self._bias = torch.zeros(len(self.names))

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        """Return the columns that a split has to have."""
        return arguments.text_column or "text", arguments.label_column or "label"

    def load(self, source: str, **settings: Any) -> PreTrainedModel:
        # what another seed's run chose is not this one's
        self.threshold = 0.5
        names = {i: str(name) for i, name in enumerate(self.names)}
        found = super().load(
            source,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            problem_type="multi_label_classification" if self.is_multilabel else "single_label_classification",
            # a head for other labels is made anew
            ignore_mismatched_sizes=True,
            **settings,
        )
        for name, module in found.named_modules():
            is_last = isinstance(module, torch.nn.Linear) and module.out_features == len(names)
            if is_last and module.bias is not None and f"{name}.bias" in self.made:
                module.bias.data.copy_(self._bias)
        return found

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        text, label = self.columns(self.arguments)
        self.count(split, kind)

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = listed(tokenize(tokenizer, reading, held[text]))
            return {**found, "labels": [self.numbers(one, kind) for one in held[label]]}

        return encoded(split, rows)

    def count(self, split: Dataset, kind: str) -> None:
        """Let new heads begin by saying how often each label is in the training split.

        Source: Lin et al. 2017, arXiv:1708.02002, section 3.3.
        """
        if kind != "train":
            return
        labels = split[self.columns(self.arguments)[1]]
        counts = Counter(one for label in labels for one in self._found([label], kind))
        share = torch.tensor([counts[one] + 1 for one in self._index]) / (len(labels) + 2)
        self._bias = torch.logit(share) if self.is_multilabel else share.log()

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        labels = torch.tensor([row["labels"] for row in rows])
        batch = super().collate(
            [{name: row[name] for name in row if name != "labels"} for row in rows], tokenizer, reading
        )
        return {**batch, "labels": labels.float() if self.is_multilabel else labels}

    def choose(self, predictions: np.ndarray, labels: np.ndarray) -> None:
        """Choose the threshold that gives the largest micro F1; for single labels nothing."""
        if self.is_multilabel:
            chances = _chances(predictions)
            self.threshold = max(THRESHOLDS, key=lambda at: _micro_f1(chances >= at, labels > 0.5))

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return the metrics of logits ``[documents, labels]``."""
        if not self.is_multilabel:
            said = predictions.argmax(1)
            found = load_metric("accuracy").compute(predictions=said, references=labels)
            return {**found, **self.scores("f1", said, labels)}
        said = (_chances(predictions) >= self.threshold).astype(int)
        return self.scores("f1", said, labels.astype(int), config_name="multilabel")

    def details(self) -> dict[str, Any]:
        return {"threshold": self.threshold} if self.is_multilabel else {}

    def numbers(self, label: Any, kind: str) -> Any:
        """Return the number of a document's label, or of several 0 or 1 for each that there is."""
        given = {self._index[one] for one in self._found([label], kind)}
        return [float(i in given) for i in range(len(self.names))] if self.is_multilabel else given.pop()

    def _found(self, labels: Any, kind: str) -> set[Any]:
        """Return the different labels of documents of a split."""
        names = self._named[kind]
        held = [one for label in labels for one in (label if self.is_multilabel else [label])]
        if strange := [one for one in held if not isinstance(one, str | int)]:
            raise RecipeError(
                f"column {self.columns(self.arguments)[1]!r} of the {kind} split has the label {strange[0]!r}; labels are text "
                "or whole numbers"
            )
        return {one if names is None else names[one] for one in held}


def _chances(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _micro_f1(said: np.ndarray, there: np.ndarray) -> float:
    total = said.sum() + there.sum()
    return float(2 * (said & there).sum() / total) if total else 0.0
