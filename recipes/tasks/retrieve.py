"""Retrieval: documents and queries as vectors, so that a query lies near the document that answers it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from transformers import AutoModel

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.documents import values_of
from hf_sparse.recipes.order import OrderedTrainer
from hf_sparse.recipes.processes import count_processes, mean_of_all
from hf_sparse.recipes.reading import Reading, pad, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed, without_pooler

# what cosines are multiplied by, as sentence-transformers does
SCALE = 20.0
_QUERY = "query_"


class RetrievalTrainer(OrderedTrainer):
    """Trains a model whose vectors are means over tokens, of unit length, against the other documents of a batch.

    On several processes these are the documents of all.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        documents, queries = vectors_of(model, inputs)
        others, owner = documents, inputs["owner"]
        queries = queries[: len(owner)]
        if model.training and count_processes() > 1:
            # of equal shape everywhere: transformers makes batches of training even
            others = torch.cat(all_gather(documents))
            owner = owner + torch.distributed.get_rank() * len(documents)
        total = torch.nn.functional.cross_entropy(SCALE * queries @ others.t(), owner, reduction="sum")
        loss = mean_of_all(total, len(queries), is_training=model.training)
        return (loss, (documents, queries)) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return the loss, a batch's vectors ``[B, 1 + Q, D]``, and how many queries each document has."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, (documents, queries) = self.compute_loss(model, inputs, return_outputs=True)
        counts = torch.bincount(inputs["owner"], minlength=len(documents))
        rows = [torch.cat([one[None], own]) for one, own in zip(documents, queries.split(counts.tolist()), strict=True)]
        return loss.detach(), torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100.0), counts


class Retrieval(Task):
    """Queries and the documents that answer them; a document may have one query or a list of them.

    A query that several documents of the split have is left out: there is no telling which one is meant. Documents without a
    query are among those that are searched, and are not trained on.
    """

    best = "mrr"
    labels = ("owner",)
    auto = AutoModel
    trainer = RetrievalTrainer

    def __init__(self, splits: Mapping[str, Dataset], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        self._shared = {kind: _shared(split, self.columns(arguments)[1]) for kind, split in splits.items()}

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return arguments.text_column or "text", arguments.query_column or "query"

    def load(self, source: str, **settings: Any) -> Any:
        return without_pooler(super().load(source, **settings))

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        text, query = self.columns(self.arguments)
        # a query that is longer than a chunk is read alone all the same
        own = Reading(reading.chunk or reading.longest, cuts=reading.cuts)

        kept = [self._own(queries, kind) for queries in values_of({_first(query): split[_first(query)]}, query)]
        if not any(kept):
            raise RecipeError(f"the {kind} split has no query that belongs to a single document")
        if kind == "train":
            split = split.select([i for i, queries in enumerate(kept) if queries])

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            found = listed(tokenize(tokenizer, reading, held[text]))
            asked = [self._own(queries, kind) for queries in values_of(held, query)]
            read = [listed(tokenize(tokenizer, own, queries)) if queries else {} for queries in asked]
            return {**found, **{f"{_QUERY}{name}": [one.get(name, []) for one in read] for name in found}}

        return encoded(split, rows)

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        own = [{name: row[name] for name in row if not name.startswith(_QUERY)} for row in rows]
        names = [name for name in rows[0] if name.startswith(_QUERY)]
        asked = [
            {name.removeprefix(_QUERY): row[name][i] for name in names}
            for row in rows
            for i in range(len(row[names[0]]))
        ]
        counts = torch.tensor([len(row[names[0]]) for row in rows])
        # a batch of documents without a query still has one, of nobody
        nobody = [{name: row[name][:1] for name in own[0]} for row in own[:1]]
        short = pad(asked or nobody, 1, {"input_ids": tokenizer.pad_token_id})
        return {
            **super().collate(own, tokenizer, reading),
            **{f"{_QUERY}{name}": value for name, value in short.items()},
            "owner": torch.arange(len(rows)).repeat_interleave(counts),
        }

    def finish(self, batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
        if "global_attention_mask" in batch:
            marks = torch.zeros_like(batch[f"{_QUERY}attention_mask"])
            marks[:, 0] = 1
            batch[f"{_QUERY}global_attention_mask"] = marks
        return batch

    def _own(self, queries: Any, kind: str) -> list[str]:
        """Return the queries that belong to one document alone."""
        return [one for one in _listed(queries) if one not in self._shared[kind]]

    def metrics(self, predictions: np.ndarray, labels: np.ndarray, kind: str) -> dict[str, float]:
        """Return recall and mean reciprocal rank among all documents of the split, given ``[N, 1 + Q, D]``."""
        scores, references = [], []
        for i, (held, count) in enumerate(zip(predictions, labels, strict=True)):
            scores += list(held[1 : 1 + count] @ predictions[:, 0].T)
            references += [i] * int(count)
        return self.scores("retrieval", scores, references)


def vectors_of(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return vectors of the documents ``[B, D]`` and the queries ``[Q, D]`` of a batch."""
    documents = {name: held for name, held in batch.items() if not name.startswith(_QUERY) and name != "owner"}
    queries = {name.removeprefix(_QUERY): held for name, held in batch.items() if name.startswith(_QUERY)}
    return _means(model, documents), _means(model, queries)


def _means(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return means over tokens, of unit length."""
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][:, :, None].to(hidden.dtype)
    means = (hidden * real).sum(1) / real.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(means, dim=-1)


def _listed(queries: Any) -> list[str]:
    return [queries] if isinstance(queries, str) else list(queries)


def _first(column: str) -> str:
    return column.partition(".")[0]


def _shared(split: Dataset, column: str) -> set[str]:
    """Return the queries that more than one document has."""
    asked = values_of({_first(column): split[_first(column)]}, column)
    counts = Counter(query for queries in asked for query in set(_listed(queries)))
    return {query for query, count in counts.items() if count > 1}
