"""Token classification: a tag for each word of a document."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset
from transformers import AutoModelForTokenClassification, PreTrainedModel

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.reading import Reading, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed

# of a token that has no tag: a word's tag is that of its first token
NO_TAG = -100


class Tagging(Task):
    """The tags of a dataset: "O", "B-kind" and "I-kind", as strings or as a ClassLabel.

    Attributes:
        names: of the tags, in order.

    Raises:
        RecipeError: if a split has a tag that the training split has not.
    """

    best = "f1"
    auto = AutoModelForTokenClassification

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        column = self.columns(arguments)[1]
        own = getattr(splits["train"].features[column], "feature", None)
        if own is None:
            raise RecipeError(f"column {column!r} must hold a list of tags for each document, one for each word")
        self._is_numbered = isinstance(own, ClassLabel)
        held = {kind: {tag for tags in split[column] for tag in tags} for kind, split in splits.items()}
        self.names: list[str] = own.names if isinstance(own, ClassLabel) else sorted(held["train"])
        for kind, found in held.items():
            if not self._is_numbered and (unseen := sorted(found - set(self.names))):
                raise RecipeError(f"the {kind} split has tags that the training split has not: {', '.join(unseen[:5])}")

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

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = tokenize(tokenizer, reading, held[words], is_split=True)
            for text, own, row in zip(held[words], held[tags], found, strict=True):
                if len(text) != len(own):
                    raise RecipeError(f"a document of the {kind} split has {len(text)} words and {len(own)} tags")
                row["labels"] = self._labels(own, row["word_ids"])
            return listed(found)

        return encoded(split, rows)

    def _labels(self, tags: list[Any], words: list[int | None]) -> list[int]:
        found, last = [], None
        for word in words:
            # of a word cut by a chunk the rest has none
            tag = None if word is None or word == last else tags[word]
            found.append(NO_TAG if tag is None else tag if self._is_numbered else self.names.index(tag))
            last = word if word is not None else last
        return found

    def reduce(self, logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return F1 of entities, given tags ``[documents, tokens]``."""
        pairs = [
            [(self.names[one], self.names[other]) for one, other in zip(said, there, strict=True) if other != NO_TAG]
            for said, there in zip(predictions, labels, strict=True)
        ]
        said, there = ([[pair[i] for pair in row] for row in pairs] for i in range(2))
        return dict(load_metric("entity_f1").compute(predictions=said, references=there))
