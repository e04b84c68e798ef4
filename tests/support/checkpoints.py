"""Tiny dense checkpoints on disk, with tokenizers, as a person would have them; nothing here knows hf_sparse."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.support.models import tiny_model

_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_WORDS = ("a", "every", "long", "of", "page", "reads", "river", "stone", "the", "word")
_ROLES = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
MODEL_TYPES = {
    "Bert": "bert",
    "Roberta": "roberta",
    "XLMRoberta": "xlm-roberta",
    "Camembert": "camembert",
    "DistilBert": "distilbert",
    "Electra": "electra",
}


def write_checkpoint(
    folder: Path,
    family: str = "Bert",
    head: str = "Model",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **fields: Any,
) -> PreTrainedModel:
    """Save a tiny random model, and return it."""
    model = tiny_model(family, head, **fields).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_tokenizer(folder: Path, family: str = "Bert", *, max_length: int = 128) -> None:
    """Save a tokenizer of the family's own class, with a truncation and a fixed padding in tokenizer.json."""
    names = {"DistilBert": "Bert", "Electra": "Bert"}
    tokenizer_class = getattr(transformers, f"{names.get(family, family)}Tokenizer")
    if family in ("XLMRoberta", "Camembert"):
        pieces = [*_SPECIAL, *(f"▁{word}" for word in _WORDS)]
        made = tokenizer_class(vocab=[(piece, -float(at)) for at, piece in enumerate(pieces)], **_ROLES)
    elif family == "Roberta":
        letters = [*_SPECIAL, "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
        made = tokenizer_class(vocab={letter: at for at, letter in enumerate(letters)}, merges=[], **_ROLES)
    else:
        made = tokenizer_class(vocab={word: at for at, word in enumerate([*_SPECIAL, *_WORDS])}, **_ROLES)
    made.model_max_length = max_length
    made.save_pretrained(folder)
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    held["truncation"] = {"direction": "Right", "max_length": max_length, "strategy": "LongestFirst", "stride": 0}
    held["padding"] = {
        "strategy": {"Fixed": max_length},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    path.write_text(json.dumps(held))


def write_image_processor(folder: Path, **fields: Any) -> None:
    """Save the settings of an image processor: ViT's, for images of 16 x 16 pixels."""
    held = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": 16, "width": 16},
    }
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({key: value for key, value in {**held, **fields}.items() if value is not None}))


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    held = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
