"""The documents and the questions of the demo: topics of Python's own manual, and passages from deep inside them."""

import random
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

PASSAGE = 48
DEEP = 600
PER_TOPIC = 12
SEED = 0
# a topic needs some room beyond DEEP to draw passages from
LEAST = 700


@dataclass(frozen=True)
class Corpus:
    """All topics as token ids, and queries from the long ones.

    Attributes:
        names: of the topics, sorted.
        documents: token ids of each topic, without special tokens.
        chosen_on: queries (topic index, token ids) of the topics on which settings are chosen.
        scored: queries of the topics that are scored.
    """

    names: tuple[str, ...]
    documents: tuple[tuple[int, ...], ...]
    chosen_on: tuple[tuple[int, tuple[int, ...]], ...]
    scored: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def longest(self) -> int:
        """Return the tokens of the longest document."""
        return max(map(len, self.documents))

    @property
    def positions(self) -> int:
        """Return the positions that the longest document needs between two special tokens, a multiple of 64."""
        return -(-(self.longest + 2) // 64) * 64


def read_corpus(tokenizer: Any) -> Corpus:
    """Return the corpus under a tokenizer.

    A third of the topics of at least 700 tokens, drawn with a fixed seed, is set aside for choosing settings. Each
    query is a passage of 48 tokens that starts beyond token 600 of a topic; the topic it came from is the answer.
    """
    names = tuple(sorted(topics))
    documents = tuple(
        tuple(tokenizer(topics[name], add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        for name in names
    )
    long = [i for i, ids in enumerate(documents) if len(ids) >= LEAST]
    draw = random.Random(SEED)
    draw.shuffle(long)
    third = len(long) // 3
    return Corpus(names, documents, _passages(long[:third], documents), _passages(long[third:], documents))


def _passages(indices: list[int], documents: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    draw = random.Random(SEED + 1)
    queries = []
    for index in sorted(indices):
        ids = documents[index]
        starts = range(DEEP, len(ids) - PASSAGE + 1)
        queries += [(index, ids[s : s + PASSAGE]) for s in sorted(draw.sample(starts, min(PER_TOPIC, len(starts))))]
    return tuple(queries)
