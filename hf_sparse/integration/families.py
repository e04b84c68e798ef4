"""Families: how model types store their positions, and so how long their inputs are and may become."""

from dataclasses import dataclass
from typing import Any

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.rotary import rotary_length
from hf_sparse.integration.vision import VISION_FAMILIES, VisionFamily

# what T5 was trained on: a bias by distance has no end, and its config may name none
_TRAINED_ON = 512
# fields of a config of one model that reads something else than text
_OTHER_INPUTS = ("image_size", "patch_size", "num_mel_bins", "conv_dim", "feature_size", "num_channels")


@dataclass(frozen=True)
class Family:
    """How one model type that reads text stores its positions.

    Attributes:
        positions: how the names of the tables of positions end; "" where there is none, or none that may change.
        kind: "learned" or "sinusoidal" tables; "rotary" positions and "buckets" of distances, which have none; or "fixed", of
            which nothing is known but the longest input.
        counts_from_padding: whether positions start at ``pad_token_id + 1`` (RoBERTa), rows before that being unused.
        unused_rows: rows of a table before position 0 that belong to none, whatever the padding is (BART).
        buffers: how the names of tensors end that older versions saved and no model reads.
        field: what a config calls the longest input of positions that are no rotary ones.
    """

    positions: str = "embeddings.position_embeddings.weight"
    kind: str = "learned"
    counts_from_padding: bool = False
    unused_rows: int = 0
    buffers: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")
    field: str = "max_position_embeddings"

    def offset(self, config: Any) -> int:
        """Return the rows of the position table that come before position 0."""
        return config.pad_token_id + 1 if self.counts_from_padding else self.unused_rows

    def length(self, config: Any) -> int:
        """Return the longest input the positions serve, in tokens."""
        if self.kind == "rotary":
            return rotary_length(config)
        longest = getattr(config, self.field, None)
        if longest is None and self.kind == "buckets":
            longest = _TRAINED_ON
        return int(longest) - self._counted(config)  # type: ignore[arg-type]

    def limit(self, config: Any, length: int) -> int:
        """Return what the config has to say for inputs of a length, in tokens."""
        return length + self._counted(config)

    def rows(self, config: Any) -> int:
        """Return the rows of the position table."""
        return self.length(config) + self.offset(config)

    def _counted(self, config: Any) -> int:
        """Return the rows before position 0 that ``max_position_embeddings`` counts: RoBERTa's does, BART's does not."""
        return self.offset(config) if self.counts_from_padding else 0


_ROTARY = Family("", "rotary", buffers=(".rotary_emb.inv_freq",))
_BUCKETS = Family("", "buckets", buffers=(), field="n_positions")
_FIXED = Family("", "fixed", buffers=())
_LEARNED_OFFSET = Family("embed_positions.weight", unused_rows=2)

# model types of which more is known than their config says
FAMILIES: dict[str, Family | VisionFamily] = {
    "albert": Family(),
    "bart": _LEARNED_OFFSET,
    "bert": Family(),
    "camembert": Family(counts_from_padding=True),
    "data2vec-text": Family(counts_from_padding=True),
    "distilbert": Family(),
    "electra": Family(),
    "ernie": Family(),
    # the causal mask was saved with every layer
    "gpt2": Family("wpe.weight", buffers=(".attn.bias", ".attn.masked_bias")),
    # the causal mask and the frequencies were saved with every layer
    "gpt_neox": Family("", "rotary", buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")),
    "marian": Family("embed_positions.weight", "sinusoidal"),
    "mbart": _LEARNED_OFFSET,
    "mobilebert": Family(),
    "opt": _LEARNED_OFFSET,
    "pegasus": Family("embed_positions.weight", "sinusoidal"),
    "plbart": _LEARNED_OFFSET,
    "roberta": Family(counts_from_padding=True),
    "roberta-prelayernorm": Family(counts_from_padding=True),
    # of sounds; the text it writes has a table of its own
    "whisper": Family("", "fixed", buffers=(), field="max_source_positions"),
    "xlm-roberta": Family(counts_from_padding=True),
    "xlm-roberta-xl": Family(counts_from_padding=True),
    **VISION_FAMILIES,
}


def family_of(config: Any) -> Family | VisionFamily:
    """Return how a config's model type stores positions; sparse types count as the dense type they came from.

    Raises:
        UnsupportedModelError: if the config does not tell.
    """
    model_type = getattr(config, "dense_model_type", None) or config.model_type
    return FAMILIES.get(model_type) or _by_config(config, model_type)


def parts_of(config: Any) -> list[str]:
    """Return the fields of a config that hold configs of models of their own."""
    return [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None]


def _by_config(config: Any, model_type: str) -> Family:
    """Return what a config says by itself of positions that no row tells about."""
    parts = parts_of(config)
    if parts:
        raise UnsupportedModelError(
            f"model type {model_type!r} is made of several models ({', '.join(parts)}), and one pattern cannot be for all; "
            "save the part that is to be sparse as a model of its own and convert that"
        )
    others = [name for name in _OTHER_INPUTS if getattr(config, name, None) is not None]
    if others:
        raise UnsupportedModelError(
            f"model type {model_type!r} reads something else than text ({others[0]}), and how it lays that out is not in the "
            "table; hf_sparse.sparsify_ can make it sparse in memory"
        )
    if getattr(config, "rope_parameters", None):
        return _ROTARY
    if getattr(config, "relative_attention_num_buckets", None):
        return _BUCKETS
    if isinstance(getattr(config, "max_position_embeddings", None), int):
        return _FIXED
    raise UnsupportedModelError(
        f"model type {model_type!r} cannot be converted: its config names no longest input (max_position_embeddings); "
        "hf_sparse.sparsify_ can make it sparse in memory"
    )
