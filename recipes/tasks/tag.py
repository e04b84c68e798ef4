"""Token classification: a tag for each word of a document."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoModelForTokenClassification, PreTrainedModel

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics.entity_f1 import entities
from hf_sparse.recipes.reading import Reading, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed, names_of
from hf_sparse.recipes.token_loss import NO_LABEL, TokenTrainer


class Tagging(Task):
    """The tags of a dataset: "O", "B-kind" and "I-kind", as strings or as a ClassLabel.

    Words that a model does not read have no entity for it.

    Attributes:
        names: of the tags, in order.

    Raises:
        RecipeError: if a tag is none of those, or a split has one that the training split has not.
    """

    best = "f1"
    auto = AutoModelForTokenClassification
    trainer = TokenTrainer
    counts_tokens = True

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        column = self.columns(arguments)[1]
        own = getattr(splits["train"].features[column], "feature", None)
        if own is None:
            raise RecipeError(f"column {column!r} must hold a list of tags for each document, one for each word")
        # splits may number the same names in other ways
        self._named = {kind: names_of(split.features[column]) for kind, split in splits.items()}
        held = {
            kind: set(self._said([t for tags in split[column] for t in tags], kind)) for kind, split in splits.items()
        }
        self.names: list[str] = self._named["train"] or sorted(held["train"])
        for kind, found in held.items():
            if unseen := sorted(found - held["train"]):
                raise RecipeError(f"the {kind} split has tags that the training split has not: {', '.join(unseen[:5])}")
        try:
            entities(self.names)
        except ValueError as error:
            raise RecipeError(f"column {column!r}: {error}") from error
        # of what is judged: the tags of all words, and which words have a label in the row
        self._tags: dict[str, list[list[str]]] = {}
        self._read: dict[str, list[list[int]]] = {}

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return arguments.text_column or "tokens", arguments.label_column or "tags"

    def load(self, source: str, **settings: Any) -> PreTrainedModel:
        names = dict(enumerate(self.names))
        return super().load(
            source,
            num_labels=len(names),
            id2label=names,
            label2id={name: i for i, name in names.items()},
            # a head for other tags is made anew
            ignore_mismatched_sizes=True,
            **settings,
        )

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        words, tags = self.columns(self.arguments)
        self._tags[kind], self._read[kind] = [self._said(own, kind) for own in split[tags]], []

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = tokenize(tokenizer, reading, held[words], is_split=True)
            for text, own, row in zip(held[words], held[tags], found, strict=True):
                if len(text) != len(own):
                    raise RecipeError(f"a document of the {kind} split has {len(text)} words and {len(own)} tags")
                row["labels"] = self._labels(self._said(own, kind), row["word_ids"])
            return listed(found, ("word_ids",))

        found = encoded(split, rows)
        self._read[kind] = [
            [word for word, label in zip(row["word_ids"], row["labels"], strict=True) if label != NO_LABEL]
            for row in found.select_columns(["word_ids", "labels"])
        ]
        return found.remove_columns("word_ids")

    def _said(self, tags: list[Any], kind: str) -> list[str]:
        """Return tags by their names."""
        names = self._named[kind]
        return list(tags) if names is None else [names[tag] for tag in tags]

    def _labels(self, tags: list[str], words: list[int | None]) -> list[int]:
        found, last = [], None
        for word in words:
            # of a word cut by a chunk the rest has none
            found.append(NO_LABEL if word is None or word == last else self.names.index(tags[word]))
            last = word if word is not None else last
        return found

    def reduce(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return F1 of entities, given the numbers of tags ``[documents, tokens]``."""
        said = []
        for row, there, read, tags in zip(predictions, labels, self._read[kind], self._tags[kind], strict=True):
            found = ["O"] * len(tags)
            for word, number in zip(read, row[: len(there)][there != NO_LABEL], strict=True):
                found[word] = self.names[number]
            said.append(found)
        return self.scores("entity_f1", said, self._tags[kind])
