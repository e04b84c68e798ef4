"""Extractive question answering: the span of one long context that answers a question."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForQuestionAnswering

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.reading import Reading, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed

# tokens of the longest answer that is considered
LONGEST_ANSWER = 64
# starts and ends that are considered, the likeliest
CANDIDATES = 20
_EDGES = ("start_positions", "end_positions")


class Answering(Task):
    """Questions about contexts, with answers as SQuAD has them: {"text": [...], "answer_start": [...]}.

    The tokens of the question are global. A question without an answer, or whose answer was cut off, is answered by the first
    token. Answers of more than 64 tokens are learned, but never given.
    """

    best = "f1"
    labels = _EDGES
    auto = AutoModelForQuestionAnswering

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        context, column, _ = self.columns(arguments)
        for kind, split in splits.items():
            for i, (text, answer) in enumerate(zip(split[context], split[column], strict=True)):
                _check_answer(text, answer, f"the {kind} split, row {i}: column {column!r}")
        self._may_be_empty = any(not answer["text"] for answer in splits["train"][column])
        # what spans and answers of a split are looked up in
        self._judged: dict[str, tuple[Dataset, Dataset]] = {}

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return (
            arguments.text_column or "context",
            arguments.label_column or "answers",
            arguments.query_column or "question",
        )

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        context, answers, question = self.columns(self.arguments)

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found: list[dict[str, Any]] = tokenize(tokenizer, reading, held[question], held[context])
            for row, answer in zip(found, held[answers], strict=True):
                of_context = [one == 1 for one in row["sequence_ids"]]
                row["global_attention_mask"] = [int(one == 0) for one in row["sequence_ids"]]
                row["global_attention_mask"][0] = 1
                row["is_context"] = [int(one) for one in of_context]
                row["start_positions"], row["end_positions"] = _span(answer, row["offset_mapping"], of_context)
            return listed(found, ("offset_mapping",))

        found = encoded(split, rows)
        self._judged[kind] = split, found
        return found

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        left_out = {*_EDGES, "offset_mapping", "is_context"}
        held = [{name: row[name] for name in row if name not in left_out} for row in rows]
        edges = {name: torch.tensor([row[name] for row in rows]) for name in _EDGES}
        return {**super().collate(held, tokenizer, reading), **edges}

    def metrics(self, predictions: tuple[np.ndarray, np.ndarray], labels: Any, kind: str) -> dict[str, float]:
        """Return exact match and F1 of words, given the logits of starts and ends, each ``[N, T]``."""
        split, rows = self._judged[kind]
        context, answers, _ = self.columns(self.arguments)
        said = [
            self._said(starts, ends, row["is_context"], row["offset_mapping"], text)
            for starts, ends, row, text in zip(*predictions[:2], rows, split[context], strict=True)
        ]
        wanted = [answer["text"] for answer in split[answers]]
        return self.scores("question_answering", said, wanted)

    def _said(
        self, starts: np.ndarray, ends: np.ndarray, is_context: list[int], offsets: list[list[int]], text: str
    ) -> str:
        """Return the likeliest span of a context."""
        at = np.flatnonzero(is_context)
        best, found = (starts[0] + ends[0] if self._may_be_empty else -np.inf), ""
        first, last = (at[np.argsort(-logits[at])[:CANDIDATES]] for logits in (starts, ends))
        for start in first:
            for end in last:
                if start <= end < start + LONGEST_ANSWER and starts[start] + ends[end] > best:
                    best, found = starts[start] + ends[end], text[offsets[start][0] : offsets[end][1]]
        return found


def _check_answer(context: str, answer: Any, where: str) -> None:
    """Check that an answer is as SQuAD has it, and stands where it says."""
    texts, starts = (
        (answer.get(name) for name in ("text", "answer_start")) if isinstance(answer, dict) else (None, None)
    )
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise RecipeError(
            f'{where} must be {{"text": [...], "answer_start": [...]}} of one length, got {str(answer)[:80]}'
        )
    for text, start in zip(texts, starts, strict=True):
        if start < 0 or context[start : start + len(text)] != text:
            raise RecipeError(
                f"{where} says that {text[:40]!r} stands at character {start} of the context, and it does not"
            )


def _span(answer: Any, offsets: list[tuple[int, int]], is_context: list[bool]) -> tuple[int, int]:
    """Return the first and the last token of an answer; the first token of all twice where it has none."""
    if not answer["text"]:
        return 0, 0
    start = answer["answer_start"][0]
    stop = start + len(answer["text"][0])
    held = [
        i
        for i, (inside, (a, b)) in enumerate(zip(is_context, offsets, strict=True))
        if inside and a < stop and b > start
    ]
    # all of it has to be there
    if not held or offsets[held[0]][0] > start or offsets[held[-1]][1] < stop:
        return 0, 0
    return held[0], held[-1]
