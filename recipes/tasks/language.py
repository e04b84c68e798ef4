"""Language modelling, masked or causal: training that goes on after a conversion."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_sparse.errors import RecipeError
from hf_sparse.integration.layers import is_causal, self_attention_modules
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.metrics import load_metric
from hf_sparse.recipes.reading import Reading, tokenize
from hf_sparse.recipes.tasks.parent import Task, encoded, listed, patterns_of
from hf_sparse.recipes.token_loss import NO_LABEL, NextTokenTrainer, TokenTrainer

# share of the tokens that are masked
MASKED = 0.15


class _Language(Task):
    """Texts, joined into rows of the longest length where that is asked for.

    In a row of several each reads itself alone, by ``document_ids``. A dense model, which knows none, has rows of one.
    """

    best = "loss"
    is_larger_better = False
    counts_tokens = True
    # rows of the dense model's length hold all of the text
    baselines = ("truncated",)
    truncated = "dense, {} tokens at a time"

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return (arguments.text_column or "text",)

    @classmethod
    def title_of_truncated(cls, arguments: RecipeArguments, tokens: int) -> str:
        return (cls.truncated if arguments.packing else Task.truncated).format(tokens)

    def load(self, source: str, **settings: Any) -> Any:
        model = super().load(source, **settings)
        shared = [one.key for one in patterns_of(model) if one.has_nodes and not one.takes_segments]
        if shared and self.arguments.packing:
            raise RecipeError(
                f"pattern {shared[0]!r} has nodes that the documents of a joined row would share; pass --packing false"
            )
        closed = model.__dict__.get("_sparse_closed") if patterns_of(model) else None
        if closed is not None and self.arguments.packing:
            raise RecipeError(
                f"{type(model).__name__} cannot be told where documents of a joined row begin: {closed} of transformers passes "
                "nothing on; pass --packing false"
            )
        return model

    def encode(self, split: Any, kind: str, tokenizer: Any, reading: Reading) -> Any:
        (text,) = self.columns(self.arguments)

        def rows(held: dict[str, list[Any]]) -> dict[str, list[Any]]:
            texts = [one for one in held[text] if one and one.strip()]
            if not texts:
                return {"input_ids": [], "attention_mask": []}
            if self.arguments.packing and reading.chunk is None:
                joined = [[one] for one in texts] if reading.is_dense else [texts]
                parts = [packed(own, tokenizer, reading.longest) for own in joined]
                return {name: [row for part in parts for row in part[name]] for name in parts[0]}
            found = listed(tokenize(tokenizer, reading, texts))
            return {name: found[name] for name in ("input_ids", "attention_mask")}

        found = encoded(split, rows)
        if isinstance(found, Dataset) and not len(found):
            raise RecipeError(f"the {kind} split holds no text")
        return found

    def reduce(self, logits: Any, labels: Tensor) -> Tensor:
        """Return the loss of a row's predicted tokens and their number, ``[B, 2]``."""
        held = logits[0] if isinstance(logits, tuple) else logits
        said, wanted = self._aligned(held, labels)
        losses = torch.nn.functional.cross_entropy(
            said.float().transpose(1, 2), wanted, ignore_index=NO_LABEL, reduction="none"
        )
        return torch.stack([losses.sum(1), (wanted != NO_LABEL).sum(1)], 1)

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and what they are to say, place by place."""
        return logits, labels


class MaskingTrainer(TokenTrainer):
    """Masks a row by what the seed, the step and the row say: the same on any processes, and when a run goes on."""

    def labelled(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids, labels = batch["input_ids"].clone(), torch.full_like(batch["input_ids"], NO_LABEL)
        for row, is_real in enumerate(batch["attention_mask"] != 0):
            own = ids[row, is_real]
            drawn = zlib.crc32(f"{self.args.seed} {self.state.global_step} {own.tolist()}".encode())
            found = masked(own.cpu(), self.processing_class, torch.Generator().manual_seed(drawn))
            ids[row, is_real], labels[row, is_real] = (held.to(ids.device) for held in found)
        return {**batch, "input_ids": ids, "labels": labels}


class Masked(_Language):
    """Masked tokens: 15 % of them, of which four in five are replaced by the mask and one in ten by any token.

    In evaluation the same ones are masked each time.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1.
    """

    auto = AutoModelForMaskedLM
    trainer = MaskingTrainer

    def encode(self, split: Any, kind: str, tokenizer: Any, reading: Reading) -> Any:
        if tokenizer.mask_token is None:
            raise RecipeError("the tokenizer has no mask token, so nothing can be masked; train it with clm")
        found = super().encode(split, kind, tokenizer, reading)
        if kind == "train":
            return found

        def masks(row: dict[str, Any], i: int) -> dict[str, Any]:
            ids, labels = masked(torch.tensor(row["input_ids"]), tokenizer, torch.Generator().manual_seed(i))
            return {"input_ids": ids.tolist(), "labels": labels.tolist()}

        return found.map(masks, with_indices=True, desc="Masking tokens")

    def metrics(self, predictions: np.ndarray, labels: Any, kind: str) -> dict[str, float]:
        """Return the mean loss and the perplexity of masked tokens, given losses and numbers ``[N, 2]``."""
        loss, count = predictions.sum(0)
        if not count:
            raise RecipeError(f"no token of the {kind} split was masked; it is too short")
        return {"loss": float(loss / count), "perplexity": float(np.exp(loss / count))}


class Causal(_Language):
    """Every next token."""

    auto = AutoModelForCausalLM
    trainer = NextTokenTrainer

    def __init__(self, splits: Mapping[str, Any], arguments: RecipeArguments) -> None:
        super().__init__(splits, arguments)
        self._bytes: dict[str, int] = {}

    def encode(self, split: Any, kind: str, tokenizer: Any, reading: Reading) -> Any:
        found = super().encode(split, kind, tokenizer, reading)
        if kind != "train":
            self._bytes[kind] = sum(_predicted_bytes(row, tokenizer) for row in found)
        return found

    def load(self, source: str, **settings: Any) -> Any:
        model = super().load(source, **settings)
        if not all(is_causal(module) for *_, module in self_attention_modules(model)):
            raise RecipeError(f"{source} is no decoder: its tokens read what they are to predict; train it with mlm")
        return model

    def finish(self, batch: dict[str, Tensor], tokenizer: Any) -> dict[str, Tensor]:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, NO_LABEL)
        if "document_ids" in batch:
            # nothing tells how a document begins
            begins = torch.nn.functional.pad(batch["document_ids"].diff(dim=1) != 0, (1, 0))
            labels = labels.masked_fill(begins, NO_LABEL)
        return {**batch, "labels": labels}

    def _aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return logits[:, :-1], labels[:, 1:]

    def metrics(self, predictions: np.ndarray, labels: Any, kind: str) -> dict[str, float]:
        """Return mean loss, perplexity and bits a byte, given losses and numbers of predicted tokens ``[N, 2]``."""
        loss, count = predictions.sum(0)
        reference = {"tokens": int(count), "bytes": self._bytes[kind]}
        found = load_metric("language_modeling").compute(predictions=[float(loss)], references=[reference])
        return {"loss": float(loss / count), **found}


def _predicted_bytes(row: dict[str, Any], tokenizer: Any) -> int:
    """Return how many bytes the predicted tokens of a row stand for: all but those that a document begins with."""
    ids, owners = row["input_ids"], row.get("document_ids") or [0] * len(row["input_ids"])
    first = [[ids[i]] for i in range(len(ids)) if not i or owners[i] != owners[i - 1]]
    whole, *begins = tokenizer.batch_decode([ids, *first], skip_special_tokens=True)
    return len(whole.encode()) - sum(len(text.encode()) for text in begins)


def masked(ids: Tensor, tokenizer: Any, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Return ids of which some are masked, and what these were, -100 elsewhere; special tokens stay."""
    chance, kind = (torch.rand(ids.shape, generator=generator) for _ in range(2))
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    is_chosen = (chance < MASKED) & ~special
    others = torch.randint(len(tokenizer), ids.shape, generator=generator)
    found = torch.where(is_chosen & (kind < 0.8), tokenizer.mask_token_id, ids)
    found = torch.where(is_chosen & (kind >= 0.9), others, found)
    return found, ids.masked_fill(~is_chosen, NO_LABEL)


def packed(texts: Iterable[str], tokenizer: Any, length: int) -> dict[str, list[Any]]:
    """Return texts end to end, each with its special tokens, in rows of one length; the last row may be shorter.

    Returns:
        Lists of rows: ``input_ids``, ``attention_mask`` and ``document_ids``, which count from 0 in each row.
    """
    ids: list[int] = []
    owners: list[int] = []
    for i, held in enumerate(tokenizer(list(texts), verbose=False)["input_ids"]):
        own = [*held, tokenizer.eos_token_id] if held and _lacks_end(held, tokenizer) else held
        ids += own
        owners += [i] * len(own)
    cuts = [slice(start, start + length) for start in range(0, len(ids), length)]
    return {
        "input_ids": [ids[cut] for cut in cuts],
        "attention_mask": [[1] * len(ids[cut]) for cut in cuts],
        "document_ids": [[owner - owners[cut.start] for owner in owners[cut]] for cut in cuts],
    }


def _lacks_end(ids: list[int], tokenizer: Any) -> bool:
    """Say whether a decoder's tokenizer put no end behind a text."""
    return tokenizer.eos_token_id is not None and ids[-1] not in tokenizer.all_special_ids
