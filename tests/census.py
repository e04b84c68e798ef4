"""What becomes of a model type: the proof of each row of ``hf-sparse support``, by a tiny random model."""

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

import hf_sparse
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.families import family_of, parts_of
from hf_sparse.integration.support import check_dispatches
from hf_sparse.integration.vision import VisionFamily
from tests.support.in_tree import read_by, write_in_tree
from tests.support.models import tiny_batch
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import inputs_of, said_of, tiny_of_type

NARROW, WIDE = hf_sparse.pattern("band", radius=2), hf_sparse.pattern("band", radius=500)
# types that are sparse themselves
IN_TREE = {"longformer": "Longformer", "led": "LED", "big_bird": "BigBird", "bigbird_pegasus": "BigBirdPegasus"}
# positions in time, height and width
_IN_THREE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
# what a config that has no usual names needs besides
FIELDS: dict[str, dict[str, Any]] = {
    "beit": {"use_absolute_position_embeddings": True, "use_relative_position_bias": False},
    # that of the published checkpoints
    "esm": {"position_embedding_type": "rotary"},
    "minimax": {"sliding_window": None},
    # most of its layers
    "minimax_m3_vl_text": {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mobilebert": {"normalization_type": "layer_norm"},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text", "glm_ocr_text"), _IN_THREE),
}


def examine(model_type: str, folder: Path) -> tuple[str, str]:
    """Return what becomes of a model type, and why, without its name.

    Returns:
        "works" and the kind of its positions; "refused" and the reason; or "not tried" and what was in the way.
    """
    if model_type in IN_TREE:
        return _import(IN_TREE[model_type], folder)
    try:
        refusal = _refused_by_structure(model_type)
        if refusal is not None:
            return "refused", refusal
        model = tiny_of_type(model_type, **FIELDS.get(model_type, {}))
        inputs = inputs_of(model)
        plain = said_of(model, inputs)
        assert plain.isfinite().all()
    except Exception as error:
        return "not tried", f"no tiny model of it was made: {_short(error)}"
    model.save_pretrained(folder / "dense")
    try:
        report = hf_sparse.convert(folder / "dense", folder / "sparse", NARROW)
    except (hf_sparse.HfSparseError, ValueError) as error:
        return "refused", _reason(str(error))
    narrow = _load(model, folder / "sparse", None)
    opened = _load(model, folder / "sparse", WIDE)
    got = said_of(opened, inputs)
    exact = said_of(model.double(), {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    assert_within_rounding(got, exact, plain)
    # and what the pattern leaves out is left out
    assert (said_of(narrow, inputs) - plain).abs().max() > 1e-3 * plain.abs().max()
    kind = kind_of(model.config)
    if kind in ("learned", "sinusoidal", "rotary", "buckets"):
        length = report.max_length + 86
        hf_sparse.convert(folder / "dense", folder / "longer", NARROW, max_length=length)
        longer = _load(model, folder / "longer", None)
        assert said_of(longer, inputs_of(longer, tokens=length)).isfinite().all()
    return "works", kind


def _import(family: str, folder: Path) -> tuple[str, str]:
    """Return what becomes of a type that is sparse itself, whose own pattern is kept."""
    model = write_in_tree(folder / "in-tree", family)
    hf_sparse.convert(folder / "in-tree", folder / "sparse", verify=False)
    batch = tiny_batch(112)
    # BigBird has its random blocks in training mode alone
    want = read_by(model, batch, training=family.startswith("BigBird"))
    got = read_by(AutoModel.from_pretrained(folder / "sparse"), batch)
    assert (want - got).abs().max() < 1e-5
    return "works", "imported"


def kind_of(config: Any) -> str:
    """Return how a config's model type stores positions."""
    family = family_of(config)
    return "images" if isinstance(family, VisionFamily) else family.kind


def _refused_by_structure(model_type: str) -> str | None:
    config = CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {}))
    held: Any = MODEL_MAPPING[type(config)]
    try:
        if not parts_of(config):
            check_dispatches(held[0] if isinstance(held, (tuple, list)) else held, config)
        family_of(config)
    except hf_sparse.UnsupportedModelError as error:
        return _reason(str(error))
    return None


def _load(model: nn.Module, folder: Path, pattern: hf_sparse.Pattern | None) -> Any:
    config = AutoConfig.from_pretrained(folder)
    if pattern is not None:
        config.sparse_attention["pattern"] = pattern.to_dict()
    cls: Any = sparse_model_class(type(model))  # type: ignore[arg-type]
    return cls.from_pretrained(folder, config=config).eval()


def _reason(text: str) -> str:
    """Return a reason without the names that differ from type to type."""
    for said, reason in REASONS.items():
        if re.search(said, text):
            return reason
    return _short(text)


REASONS = {
    "does not go through transformers' attention interface": "its attention does not go through the attention interface",
    "is made of several models": "it is made of several models; each part may be one that works",
    "reads something else than text": "it reads something else than text or images of a known grid",
    "names no longest input": "its config names no longest input",
    "computes attention by itself": "some of its layers compute attention by themselves",
    "never called the attention interface": "some of its layers never call the attention interface",
    "was not handed the padding mask": "its attention is not handed the padding mask",
    "has no self-attention module": "it has no self-attention module",
    "which sparse attention does not honour": "it has an attention mask of its own that sparse attention does not honour",
    "has no base model": "transformers has no base model for it",
    "reads fewer tokens than": "its positions do not begin at the first row of their table",
    "a tiny copy, which would show": "a tiny copy of it does not run with our mask and our attention",
    "differs from its source": "wide open it does not say what its source says",
}


def _short(error: Any) -> str:
    name = f"{type(error).__name__}: " if isinstance(error, Exception) else ""
    return f"{name}{' '.join(str(error).split())}"[:100]


# what the table says of the kinds of positions
WORDS = {
    "learned": "a learned table of positions repeats or is stretched",
    "sinusoidal": "its table of sines goes on",
    "rotary": "its rotary positions stay as they are or are scaled",
    "buckets": "its bias by distance has no end",
    "fixed": "it keeps its own length",
    "images": "the positions of its patches are interpolated",
    "imported": "it is sparse itself, and is read as the dense type that it otherwise is",
}
