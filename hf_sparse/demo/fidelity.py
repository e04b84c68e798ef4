"""How near BP-Transformer's pooled spans stay to the dense model, beside a band that costs as much."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel

import hf_sparse
from hf_sparse.demo.corpus import Corpus
from hf_sparse.patterns import Pattern

# tokens of a text, its two special ones included: what the dense checkpoint reads
LENGTH = 512
TEXTS = 3
NODES_PER_LEVEL = (2, 4, 8)

HEAD = f"""\
## How near BP-Transformer's pooled spans stay to the dense model

The same checkpoint, not trained either, on the first {LENGTH} tokens of three topics: the first in the alphabet that are as
long. Each cell holds two numbers: `bp_transformer` with `spans="pooled"` and the given `nodes_per_level`, then the `band` in
which a token reads as many keys on average (making the spans is not counted). The checkpoint has no language-model head; so
KL compares, token by token, the softmax over the vocabulary of the last hidden state times the word embeddings, from the
dense model to the sparse one, in nats: smaller is nearer. The cosines are those of the last hidden states, token by token,
and of their mean over the text, which is its embedding: larger is nearer.

| text | `nodes_per_level` | keys | KL | cosine of tokens | cosine of the mean |
| --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Fidelity:
    """How near a sparse model stays to the dense one on a text.

    Attributes:
        divergence: Kullback-Leibler divergence from the dense model's distribution over the vocabulary to the sparse one's,
            mean over tokens, in nats; a distribution is the softmax of a last hidden state times the word embeddings.
        tokens: cosine of the last hidden states, mean over tokens.
        embedding: cosine of their means over the text.
    """

    divergence: float
    tokens: float
    embedding: float


def fidelity(dense: Tensor, sparse: Tensor, words: Tensor) -> Fidelity:
    """Compare the last hidden states of a text.

    Args:
        dense: float ``[T, hidden_size]``.
        sparse: float ``[T, hidden_size]``.
        words: float ``[vocabulary, hidden_size]``, the word embeddings.
    """
    dense, sparse, words = dense.double(), sparse.double(), words.double()
    log_dense, log_sparse = ((hidden @ words.T).log_softmax(1) for hidden in (dense, sparse))
    divergence = (log_dense.exp() * (log_dense - log_sparse)).sum(1).mean()
    cosine = torch.nn.functional.cosine_similarity
    return Fidelity(
        float(divergence),
        float(cosine(dense, sparse, dim=1).mean()),
        float(cosine(dense.mean(0), sparse.mean(0), dim=0)),
    )


def equal_band(other: Pattern, n: int) -> Pattern:
    """Return the band in which a token reads as many keys as in another pattern, within one, on average over ``n`` tokens."""
    wanted = other.density(n)
    bands = (hf_sparse.pattern("band", radius=radius) for radius in range(n))
    return min(bands, key=lambda band: abs(band.density(n) - wanted))


def chosen_texts(corpus: Corpus) -> list[int]:
    """Return the first topics in the order of the alphabet that fill a text."""
    return [index for index, ids in enumerate(corpus.documents) if len(ids) >= LENGTH - 2][:TEXTS]


def fidelity_lines(source: Path, corpus: Corpus, special: tuple[int, int]) -> Iterator[str]:
    """Yield the section, in Markdown.

    Args:
        source: folder of the dense checkpoint.
        corpus: holds the texts.
        special: token ids put around a text.
    """
    dense, sparse = (AutoModel.from_pretrained(source).eval() for _ in range(2))
    words = dense.get_input_embeddings().weight.detach()
    texts = {
        corpus.names[index]: torch.tensor([[special[0], *corpus.documents[index][: LENGTH - 2], special[1]]])
        for index in chosen_texts(corpus)
    }
    want = {name: _last_hidden(dense, row) for name, row in texts.items()}
    pairs: list[tuple[Fidelity, Fidelity]] = []
    yield from HEAD.splitlines()
    for slots in NODES_PER_LEVEL:
        spans = hf_sparse.pattern("bp_transformer", nodes_per_level=slots, spans="pooled")
        patterns = (spans, equal_band(spans, LENGTH))
        found: list[dict[str, Fidelity]] = []
        for pattern in patterns:
            hf_sparse.sparsify_(sparse, pattern)
            found.append({name: fidelity(want[name], _last_hidden(sparse, row), words) for name, row in texts.items()})
        keys = " / ".join(f"{pattern.density(LENGTH) * LENGTH:.1f}" for pattern in patterns)
        for name in texts:
            ours, theirs = (by_text[name] for by_text in found)
            pairs.append((ours, theirs))
            numbers = (
                f"{ours.divergence:.3f} / {theirs.divergence:.3f}",
                f"{ours.tokens:.4f} / {theirs.tokens:.4f}",
                f"{ours.embedding:.4f} / {theirs.embedding:.4f}",
            )
            yield f"| {name} | {slots} | {keys} | {' | '.join(numbers)} |"
    yield ""
    entropy = torch.stack([_entropy(hidden, words) for hidden in want.values()]).mean()
    yield (
        f"{verdict(pairs)} The distributions that KL compares are nearly flat (entropy {entropy:.2f} of at most "
        f"{math.log(len(words)):.2f} nats), so its size says little; its order may be read."
    )


def verdict(pairs: list[tuple[Fidelity, Fidelity]]) -> str:
    """Say how often the spans, the first of each pair, are nearer to the dense model than the band."""
    nearer = (
        sum(ours.divergence < theirs.divergence for ours, theirs in pairs),
        sum(ours.tokens > theirs.tokens for ours, theirs in pairs),
        sum(ours.embedding > theirs.embedding for ours, theirs in pairs),
    )
    by_divergence, by_tokens, by_embedding = (f"{count} of {len(pairs)}" for count in nearer)
    return (
        f"The spans are nearer to the dense model than the band in {by_divergence} rows by KL, in {by_tokens} by the cosine "
        f"of tokens, and in {by_embedding} by the cosine of the mean; in the others they lose."
    )


def _entropy(hidden: Tensor, words: Tensor) -> Tensor:
    """Return the mean entropy over tokens, in nats, of the distributions that ``fidelity`` compares."""
    log = (hidden.double() @ words.double().T).log_softmax(1)
    return -(log.exp() * log).sum(1).mean()


def _last_hidden(model: Any, row: Tensor) -> Tensor:
    """Return the last hidden states ``[T, hidden_size]`` of one text."""
    with torch.no_grad():
        hidden: Tensor = model(input_ids=row, attention_mask=torch.ones_like(row)).last_hidden_state
    return hidden[0]
