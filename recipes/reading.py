"""How models read documents: whole, cut off, or chunk by chunk; and what tokenizers and batches make of that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse.errors import RecipeError

# batches are as long as a multiple of this where the model allows it: blocks of queries are, too
BLOCK = 64


@dataclass(frozen=True)
class Reading:
    """How a model reads documents.

    Attributes:
        longest: tokens that it reads of one, special ones included; chunks hold the same part of it, each with its own.
        chunk: tokens of each part that is read alone; None where a document is read whole.
        cuts: whether longer documents are cut off; if not, they are an error.
        is_dense: whether the model is dense, and would read across the documents of one row.
    """

    longest: int
    chunk: int | None = None
    cuts: bool = False
    is_dense: bool = False

    @property
    def multiple(self) -> int:
        """What the length of a batch is a multiple of."""
        return self.chunk or math.gcd(BLOCK, self.longest)


def tokenize(
    tokenizer: Any,
    reading: Reading,
    texts: Sequence[Any],
    seconds: Sequence[str] | None = None,
    *,
    is_split: bool = False,
) -> list[dict[str, list[Any]]]:
    """Tokenize texts, each as one row.

    Args:
        tokenizer: a fast one.
        reading: how they will be read. In chunks, every chunk has the special tokens, and all but the last are filled up.
        texts: strings, or lists of words.
        seconds: that follow them, and are what is cut; None where there are none.
        is_split: whether texts are lists of words.

    Returns:
        For each text what the tokenizer says of its tokens, such as ``input_ids`` and ``attention_mask``, and besides
        ``offset_mapping`` (first and behind the last character), ``word_ids`` and ``sequence_ids`` (None for special tokens).

    Raises:
        RecipeError: if a text is longer than ``reading.longest`` and is not to be cut off, or leaves no room for a second.
    """
    if reading.chunk is not None:
        # what is read whole is cut in the same place
        whole = tokenize(tokenizer, Reading(reading.longest, cuts=reading.cuts), texts, seconds, is_split=is_split)
        if reading.cuts:
            held = [
                _read_part(text, row, 0 if seconds is None else 1)
                for text, row in zip(seconds or texts, whole, strict=True)
            ]
            texts, seconds = (held, None) if seconds is None else (texts, held)
    settings: dict[str, Any] = {"truncation": False}
    if reading.chunk or reading.cuts:
        # a pair of which the first is too long by itself cannot be cut
        settings = {"truncation": True if seconds is None else "only_second"}
        settings["max_length"] = reading.chunk or reading.longest
        _check_seconds_fit(tokenizer, texts, seconds, settings["max_length"])
    found = tokenizer(
        list(texts),
        None if seconds is None else list(seconds),
        is_split_into_words=is_split,
        return_offsets_mapping=True,
        return_overflowing_tokens=reading.chunk is not None,
        verbose=False,
        **settings,
    )
    owners = found.pop("overflow_to_sample_mapping", range(len(texts)))
    pieces: list[list[dict[str, list[Any]]]] = [[] for _ in texts]
    for i, owner in enumerate(owners):
        row = {name: list(values[i]) for name, values in found.items()}
        pieces[owner].append({**row, "word_ids": found.word_ids(i), "sequence_ids": found.sequence_ids(i)})
    fills = {"input_ids": tokenizer.pad_token_id, "offset_mapping": (0, 0), "word_ids": None, "sequence_ids": None}
    rows = []
    for text, held in zip(seconds or texts, pieces, strict=True):
        length = len(held[0]["input_ids"])
        if not reading.cuts and reading.chunk is None and length > reading.longest:
            start = " ".join(text if is_split else text.split())[:40]
            raise RecipeError(
                f"a document has {length} tokens, more than {reading.longest}: pass --truncate to cut such off, or convert the "
                f"model with a larger --max-length; it begins {start!r}"
            )
        rows.append(_joined(held, reading.chunk, fills))
    return rows


def _read_part(text: Any, row: dict[str, list[Any]], sequence: int) -> Any:
    """Return what was read of a text, or of a list of words, given the row of its tokens."""
    at = [i for i, one in enumerate(row["sequence_ids"]) if one == sequence]
    if not at:
        return text[:0]
    return text[: row["offset_mapping"][at[-1]][1] if isinstance(text, str) else row["word_ids"][at[-1]] + 1]


def _check_seconds_fit(tokenizer: Any, texts: Sequence[Any], seconds: Sequence[str] | None, most: int) -> None:
    """Check that texts leave room for what follows them."""
    for text in () if seconds is None else texts:
        length = len(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
        if length + tokenizer.num_special_tokens_to_add(pair=True) >= most:
            raise RecipeError(
                f"a question has {length} tokens, which leaves no room for its context among {most}; it begins {text[:40]!r}"
            )


def _joined(pieces: list[dict[str, list[Any]]], chunk: int | None, fills: Mapping[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in pieces[0]}
    for piece in pieces:
        for name, values in piece.items():
            missing = 0 if chunk is None else -len(found[name]) % chunk
            found[name] += [fills.get(name, 0)] * missing + values
    return found


def pad(rows: Sequence[Mapping[str, Sequence[Any]]], multiple: int, fills: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make a batch of rows: each field as a tensor ``[B, N]``, filled up on the right.

    Args:
        rows: with equal fields, each a number for each token.
        multiple: N is one of it.
        fills: what a field is filled up with; 0 where it is not named.
    """
    width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    return {
        name: torch.tensor([[*row[name], *[fills.get(name, 0)] * (width - len(row[name]))] for row in rows])
        for name in rows[0]
    }
