"""Two models read one text: how near a sparse one stays to the dense one it came from."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from hf_sparse.conversion.layer_plan import layer_key
from hf_sparse.conversion.target import Target
from hf_sparse.conversion.texts import Texts
from hf_sparse.conversion.verify import quietly
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.kept import noting_kept

# share of tokens that masked language modelling hides
_HIDDEN = 0.15
# rows of logits that are compared at once
_ROWS = 256


def load(cls: Any, folder: Path, config: Any) -> tuple[Any, bool]:
    """Return a model in evaluation mode, in float32 and without a cache, and whether the checkpoint holds all its weights."""
    config = copy.deepcopy(config)
    config.use_cache = False
    with quietly(), torch.random.fork_rng(devices=[]):
        model, found = cls.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
    return model.eval(), not found["missing_keys"]


def load_sparse(target: Target, folder: Path) -> Any:
    """Return the sparse model that a checkpoint becomes, with the weights of a folder, dense or converted."""
    return load(sparse_model_class(target.dense_class), folder, target.config)[0]


def read(model: Any, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what a model says of one text.

    Args:
        model: dense or sparse.
        row: int64 ``[1, T]``.

    Returns:
        The last hidden states, float ``[T, hidden_size]``; and of a language model the logits, float ``[T, vocabulary]``, else
        None. Of an encoder-decoder both are the decoder's, which is given the same text.
    """
    given = {"input_ids": row, "attention_mask": torch.ones_like(row)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = row
    with torch.no_grad():
        said = model(**given, output_hidden_states=True)
    hidden = said.get("last_hidden_state")
    if hidden is None:
        hidden = (said.get("decoder_hidden_states") or said["hidden_states"])[-1]
    logits = said.get("prediction_logits", said.get("logits"))
    is_language_model = logits is not None and logits.shape == (*row.shape, model.config.vocab_size)
    return hidden[0], logits[0] if is_language_model else None


@dataclass(frozen=True, eq=False)
class Comparison:
    """How near a sparse model stays to the dense one on one text.

    Attributes:
        shares: kept attention by layer, float64 ``[H]``; NaN where it cannot be told.
        shapes: heads, key and value heads, and width of a head, by layer.
        calls: how often the model called each layer.
        divergence: Kullback-Leibler divergence from the dense model's distribution over the vocabulary to the sparse one's, in
            nats, mean over tokens; None without a language-model head.
        cosine: of the last hidden states, mean over tokens.
        hidden: last hidden states, dense and sparse, float ``[T, hidden_size]``.
    """

    shares: dict[str, Tensor]
    shapes: dict[str, tuple[int, int, int]]
    calls: dict[str, int]
    divergence: float | None
    cosine: float
    hidden: tuple[Tensor, Tensor]


def compare(dense: Any, sparse: Any, target: Target, row: Tensor, *, has_head: bool = True) -> Comparison:
    """Compare two models on one text.

    Args:
        dense: the dense model.
        sparse: what it becomes.
        target: says which pattern serves which layer.
        row: int64 ``[1, T]``.
        has_head: whether the weights of a language-model head are the checkpoint's.
    """
    patterns = {layer_key(one): [target.entry.pattern_of(one.stack, one.index)] for one in target.layers}
    # what looks at content chooses with weights of its own; read densely, its model says what the dense one says
    looks = any(pattern is not None and pattern.is_content_based for (pattern,) in patterns.values())
    seen = sparse if looks else dense
    with noting_kept(seen, patterns) as kept:
        want, want_logits = read(seen, row)
    got, got_logits = read(sparse, row)
    divergence = None
    if has_head and want_logits is not None and got_logits is not None:
        divergence = divergence_of(want_logits, got_logits)
    cosine = float(cosine_similarity(want.double(), got.double(), dim=1).mean())
    shares = {name: share[0] for name, share in kept.shares.items()}
    return Comparison(shares, kept.shapes, kept.calls, divergence, cosine, (want, got))


def divergence_of(want: Tensor, got: Tensor) -> float:
    """Return the mean divergence from one to another of logits ``[T, vocabulary]``, in nats."""
    total = 0.0
    for first in range(0, len(want), _ROWS):
        log_want, log_got = (held[first : first + _ROWS].double().log_softmax(1) for held in (want, got))
        total += float((log_want.exp() * (log_want - log_got)).sum())
    return total / len(want)


def mean_loss(model: Any, texts: Texts, rows: Sequence[Sequence[int]], length: int, own: int, objective: str) -> float:
    """Return the mean loss of a language model, in nats: on the same tokens, however much is read at once.

    Args:
        model: dense or sparse.
        texts: whose special tokens stand around all that is read.
        rows: tokens of texts, without special ones.
        length: tokens that the model reads at once, special ones included; a longer row is read in parts.
        own: the dense model's length. "causal": the first token of each part of that length counts for no model.
        objective: "causal", or "masked": 15 % of the tokens are hidden, the same ones whoever reads.
    """
    total, count, room = 0.0, 0, length - texts.special
    for number, row in enumerate(rows):
        tokens = torch.tensor(row)
        if objective == "masked":
            is_target = torch.rand(len(row), generator=torch.Generator().manual_seed(number)) < _HIDDEN
            shown = tokens.masked_fill(is_target, texts.mask or 0)
        else:
            is_target = torch.arange(len(row)) % (own - texts.special) > 0
            shown = tokens
        for first in range(0, len(row), room):
            here = slice(first, first + room)
            _, logits = read(model, texts.row(shown[here].tolist()))
            if logits is None:
                raise ValueError(f"{type(model).__name__} has no language-model head, so it has no loss")
            # what tells a token stands at it, or before it
            at = is_target[here].nonzero()[:, 0] + len(texts.before) - int(objective == "causal")
            wanted = tokens[here][is_target[here]]
            for some, those in zip(at.split(_ROWS), wanted.split(_ROWS), strict=True):
                total += float(cross_entropy(logits[some].double(), those, reduction="sum"))
            count += len(at)
    return total / max(count, 1)
