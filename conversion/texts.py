"""Texts from a file, as the tokens of a checkpoint's tokenizer."""

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hf_sparse.conversion.companions import VOCABULARIES
from hf_sparse.conversion.source import Checkpoint
from hf_sparse.errors import ConversionError

# of a text; a long one is not read to its end
MOST_TOKENS = 32_768
_MOST_TEXTS = 64
# more than a token holds of any text in words
_CHARACTERS_PER_TOKEN = 16


@dataclass(frozen=True)
class Texts:
    """Texts as tokens.

    Attributes:
        name: of the file they are from.
        documents: the tokens of each text, without special ones.
        before: special tokens in front of any text.
        after: special tokens behind any text.
        mask: the token that hides another; None where the tokenizer has none.
    """

    name: str
    documents: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    mask: int | None

    @property
    def special(self) -> int:
        """Return how many special tokens stand around a text."""
        return len(self.before) + len(self.after)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest text, special ones included."""
        return max(map(len, self.documents)) + self.special

    def pieces(self, length: int, most: int) -> tuple[Tensor, ...]:
        """Return pieces of texts, each a row for a model to read.

        The first piece of every text comes before the second of any.

        Args:
            length: tokens of a piece, special ones included.
            most: pieces, at the most.

        Returns:
            int64 ``[1, length]`` each.

        Raises:
            ValueError: if no text is as long.
        """
        room = length - self.special
        if room < 1 or length > self.longest:
            raise ValueError(
                f"texts: pieces of {length:,} tokens are wanted, and the longest text of {self.name} has {self.longest:,} "
                f"({self.special} of them special); pass longer texts, or a smaller length"
            )
        by_text = [[text[at : at + room] for at in range(0, len(text) - room + 1, room)] for text in self.documents]
        in_turn = (piece for turn in itertools.zip_longest(*by_text) for piece in turn if piece is not None)
        return tuple(self.row(piece) for piece in itertools.islice(in_turn, most))

    def row(self, tokens: Sequence[int]) -> Tensor:
        """Return tokens between the special ones, int64 ``[1, T]``."""
        return torch.tensor([[*self.before, *tokens, *self.after]])


def read_texts(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Texts:
    """Read texts with the tokenizer of a checkpoint.

    Args:
        path: a file in UTF-8. Of one that ends in ".jsonl" each line is an object whose "text" is a text, 64 of them at the
            most; any other is read as one text, whatever its lines are. Of a text 32,768 tokens are read at the most.
        checkpoint: whose tokenizer reads it.

    Raises:
        ConversionError: if the file holds no texts, or there is no tokenizer.
    """
    held = read_text(Path(path), "texts")
    texts = _read_lines(held, path) if Path(path).suffix == ".jsonl" else [held]
    return tokenize(texts, str(path), checkpoint, "texts")


def _read_lines(held: str, path: str | os.PathLike[str]) -> list[str]:
    texts: list[str] = []
    # other ends of lines may stand inside of JSON
    for number, line in enumerate(held.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ConversionError(
                f'texts: line {number} of {path} is no JSON object with a "text", as .jsonl files have'
            )
        texts.append(text)
        if len(texts) == _MOST_TEXTS:
            break
    return texts


def read_text(path: Path, asked: str) -> str:
    """Return the text of a file.

    Args:
        path: of the file, in UTF-8.
        asked: the argument it was given as, for errors.

    Raises:
        ConversionError: if it cannot be read, is not UTF-8 or is empty.
    """
    try:
        raw = path.expanduser().read_bytes()
    except FileNotFoundError:
        raise ConversionError(f"{asked}: there is no file {path}; pass a plain text in UTF-8") from None
    except OSError as error:
        raise ConversionError(
            f"{asked}: {path} cannot be read ({error.strerror}); pass a plain text in UTF-8"
        ) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConversionError(
            f"{asked}: {path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}; save it as UTF-8"
        ) from error
    if not text.strip():
        raise ConversionError(f"{asked}: {path} is empty; pass a text of a few thousand words")
    return text


def tokenize(texts: Sequence[str], name: str, checkpoint: Checkpoint, asked: str) -> Texts:
    """Return texts as tokens.

    Args:
        texts: of a long one the first ``MOST_TOKENS`` tokens are read.
        name: of the file they are from, for errors.
        checkpoint: whose tokenizer reads them.
        asked: the argument that they were given as, for errors.

    Raises:
        ConversionError: if there is no tokenizer, or it knows no token of the texts.
    """
    inner = PurePosixPath(checkpoint.inner)
    if not any(path.parent == inner and path.name in VOCABULARIES for path in checkpoint.files):
        # transformers would make one that knows no word
        raise ConversionError(f"{asked}: {checkpoint.name} has no tokenizer; save one beside its config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True)
        settings: dict[str, Any] = {"truncation": False, "padding": False, "verbose": False}
        most = MOST_TOKENS * _CHARACTERS_PER_TOKEN
        read = [tokenizer(text[:most], add_special_tokens=False, **settings)["input_ids"] for text in texts]
        blank = tokenizer("", **settings)["input_ids"]
        any_text = tokenizer("a", **settings)["input_ids"]
    # a tokenizer may be broken, or need a library that is not here
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(
            f"{asked}: the tokenizer of {checkpoint.name} cannot be loaded ({reason[:200]}); save it again"
        ) from error
    if not any(set(ids) - {tokenizer.unk_token_id} for ids in read):
        raise ConversionError(f"{asked}: {name} holds no token that the tokenizer of {checkpoint.name} knows")
    # T5 has one behind a text and none in front
    front = int(any_text[:1] == blank[:1])
    documents = tuple(tuple(ids[:MOST_TOKENS]) for ids in read)
    return Texts(name, documents, tuple(blank[:front]), tuple(blank[front:]), tokenizer.mask_token_id)
