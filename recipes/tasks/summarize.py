"""Summarisation: a short text for a long one, by an encoder and decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_sparse.integration.families import family_of
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.reading import Reading, pad, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed
from hf_sparse.recipes.token_loss import NO_LABEL, TokenTrainer


class SummarizationTrainer(TokenTrainer, Seq2SeqTrainer):
    """Judges summaries that were generated, and trains by the mean over their tokens."""

    # the decoder reads them
    keeps_labels = True


class Summarization(Task):
    """Documents and their summaries."""

    best = "rougeL"
    counts_tokens = True
    auto = AutoModelForSeq2SeqLM
    trainer = SummarizationTrainer
    settings = Seq2SeqTrainingArguments
    more: ClassVar[Mapping[str, Any]] = {"predict_with_generate": True}

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        self._wanted: dict[str, list[str]] = {}

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return arguments.text_column or "text", arguments.label_column or "summary"

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        text, summary = self.columns(self.arguments)
        self._tokenizer = tokenizer
        # whole, however many tokens of them are learned
        self._wanted[kind] = list(split[summary])
        # a decoder is no longer than its encoder
        short = Reading(min(self.arguments.max_summary_length, reading.chunk or reading.longest), cuts=True)

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = listed(tokenize(tokenizer, reading, held[text]))
            return {**found, "labels": listed(tokenize(tokenizer, short, held[summary]))["input_ids"]}

        return encoded(split, rows)

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        held = [{name: row[name] for name in row if name != "labels"} for row in rows]
        labels = pad([{"input_ids": row["labels"]} for row in rows], 1, {"input_ids": NO_LABEL})
        return {**super().collate(held, tokenizer, reading), "labels": labels["input_ids"]}

    def load(self, source: str, **settings: Any) -> PreTrainedModel:
        model = super().load(source, **settings)
        longest = family_of(model.config).length(model.config)
        model.generation_config.max_length = min(self.arguments.max_summary_length, longest)
        return model

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return ROUGE, given generated ids, filled up with -100."""
        wanted = self._wanted[kind]
        # transformers' trainer of sequences keeps what fills up the last batches of several processes
        held = predictions[: len(wanted)]
        ids = np.where(held == NO_LABEL, self._tokenizer.pad_token_id, held)
        return self.scores("rouge", self._tokenizer.batch_decode(ids, skip_special_tokens=True), wanted)
