"""The files beside the weights: which come along, and which of their limits are raised."""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from hf_sparse.conversion.image_processor import name_image_processor, raise_image_size
from hf_sparse.conversion.source import Checkpoint, read_json
from hf_sparse.conversion.target import Target
from hf_sparse.conversion.weights import weight_files

# what takes tokenizer.json as it stands
_BACKENDS = ("TokenizersBackend", "PythonBackend", "PreTrainedTokenizerFast", "MistralCommonBackend")
# folders that hold the dense model in another format, another state of it, or no part of it
_FOREIGN_FOLDERS = (
    *("onnx", "openvino", "coreml", "tflite", "original", "metal", "checkpoint-*", "global_step*", "runs", "wandb"),
    *(".git", ".cache", "__pycache__"),
)
# in the transformer's own folder: other formats of the same weights, and what its training left
_FOREIGN_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.h5", "*.h5.index.json", "*.msgpack"),
    *(
        "*.msgpack.index.json",
        "*.ot",
        "*.pt",
        "*.pth",
        "*.ckpt",
        "*.ckpt.*",
        "*.onnx",
        "*.onnx_data",
        "*.tflite",
        "*.gguf",
    ),
    *("*.mlmodel", "*.pb", "*.npz", "*.pkl", "trainer_state.json", "modeling_lsg_*.py"),
)
VOCABULARIES = (
    *("vocab.txt", "vocab.json", "tokenizer.json", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spiece.model"),
)


@dataclass(frozen=True)
class Companions:
    """The files beside the weights and config.json.

    Attributes:
        carried: those that are copied, as paths relative to the checkpoint's folder.
        rewritten: new contents of some of them, and of files that are added.
        left_behind: those that are not copied; a folder ends with "/".
        size: of what is carried, in bytes.
        separator: id of the tokenizer's separator; None where there is none or it cannot be loaded.
    """

    carried: tuple[PurePosixPath, ...]
    rewritten: dict[PurePosixPath, str]
    left_behind: tuple[str, ...]
    size: int
    separator: int | None


def plan_companions(checkpoint: Checkpoint, target: Target, *, raises_limits: bool) -> Companions:
    """Say what becomes of the files beside the weights.

    Args:
        checkpoint: the source.
        target: what it becomes.
        raises_limits: whether limits of length, and sizes of images, are set to the new ones.

    Raises:
        ConversionError: if a file whose limits are to be raised is not JSON.
    """
    ours = {path.relative_to(checkpoint.root).as_posix() for path in weight_files(checkpoint)}
    ours.add((PurePosixPath(checkpoint.inner) / "config.json").as_posix())
    carried, left = [], list(checkpoint.unfetched)
    for path in checkpoint.files:
        folder = _foreign_folder(path)
        if folder is not None:
            left.append(f"{PurePosixPath(*path.parts[: path.parts.index(folder) + 1])}/")
        elif path.as_posix() not in ours and is_foreign(path, PurePosixPath(checkpoint.inner)):
            left.append(path.as_posix())
        elif path.as_posix() not in ours:
            carried.append(path)
    rewritten = _rewritten(checkpoint, target, carried, raises_limits=raises_limits)
    return Companions(
        carried=tuple(carried),
        rewritten=rewritten,
        left_behind=tuple(sorted(set(left))),
        size=sum((checkpoint.root / path).stat().st_size for path in carried),
        separator=_separator(checkpoint, carried),
    )


def _foreign_folder(path: PurePosixPath) -> str | None:
    return next((part for part in path.parts[:-1] if _matches(part, _FOREIGN_FOLDERS)), None)


def is_foreign(path: PurePosixPath, inner: PurePosixPath) -> bool:
    """Say whether a file, as a path in a checkpoint, holds its weights, in any format, or is of its training.

    Args:
        path: of the file.
        inner: folder of the transformer.
    """
    return _foreign_folder(path) is not None or (_is_beside(path, inner) and _matches(path.name, _FOREIGN_FILES))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_beside(path: PurePosixPath, inner: PurePosixPath) -> bool:
    """Say whether a file lies in the transformer's folder or at the top: other modules' weights are their own."""
    return path.parent in (inner, PurePosixPath())


def _rewritten(
    checkpoint: Checkpoint, target: Target, carried: list[PurePosixPath], *, raises_limits: bool
) -> dict[PurePosixPath, str]:
    """Return the new contents of files with limits, by path; files that stay as they are do not appear."""
    rewritten = {}
    length = target.length if raises_limits and target.image_size is None else None
    pixels = target.image_size if raises_limits else None
    inner = PurePosixPath(checkpoint.inner)
    for path in carried:
        raise_limits = _editor(path.name)
        is_images = path == inner / "preprocessor_config.json" and target.image_size is not None
        if not is_images and (raise_limits is None or not _is_beside(path, inner)):
            continue
        held = read_json(checkpoint.root / path)
        before = json.dumps(held)
        if raise_limits is not None and length is not None:
            raise_limits(held, length)
        if is_images and pixels is not None:
            raise_image_size(held, pixels)
        if is_images:
            name_image_processor(held, target.model_type)
        if path == inner / "tokenizer_config.json":
            _name_tokenizer(held, checkpoint, target)
            # paths of the machine that saved it, which transformers leaves out as well
            for field in ("name_or_path", "special_tokens_map_file", "tokenizer_file"):
                held.pop(field, None)
        if json.dumps(held) != before:
            # a vocabulary of 250,000 entries is not spread over as many lines
            form: dict[str, Any] = {"separators": (",", ":")} if path.name == "tokenizer.json" else {"indent": 2}
            rewritten[path] = json.dumps(held, ensure_ascii=False, **form) + "\n"
    named = inner / "tokenizer_config.json"
    if named not in carried and any(path.name in VOCABULARIES and path.parent == inner for path in carried):
        made: dict[str, Any] = {} if length is None else {"model_max_length": length}
        _name_tokenizer(made, checkpoint, target)
        if made:
            rewritten[named] = json.dumps(made, indent=2) + "\n"
    return rewritten


def _editor(name: str) -> Callable[[dict[str, Any], int], None] | None:
    if name == "tokenizer_config.json":
        return _raise_tokenizer
    if name == "tokenizer.json":
        return _raise_fast_tokenizer
    is_of_sentences = fnmatchcase(name, "sentence_*_config.json") or name == "config_sentence_transformers.json"
    return _raise_sentence_transformer if is_of_sentences else None


def _raise_tokenizer(held: dict[str, Any], length: int) -> None:
    held["model_max_length"] = length
    for older in ("max_len", "max_length"):
        if isinstance(held.get(older), int):
            held[older] = length


def _raise_fast_tokenizer(held: dict[str, Any], length: int) -> None:
    if isinstance(held.get("truncation"), dict):
        held["truncation"]["max_length"] = length
    padding = held.get("padding")
    if isinstance(padding, dict) and isinstance(padding.get("strategy"), dict) and "Fixed" in padding["strategy"]:
        # a fixed padding as long as the new limit would make every short text that long
        padding["strategy"] = "BatchLongest"


def _raise_sentence_transformer(held: dict[str, Any], length: int) -> None:
    # query_length stays: it shortens queries on purpose
    for field in ("max_seq_length", "document_length"):
        if isinstance(held.get(field), int):
            held[field] = length
    for inner in ("tokenizer_args", "processor_kwargs"):
        if isinstance(held.get(inner), dict) and "model_max_length" in held[inner]:
            held[inner]["model_max_length"] = length


def _name_tokenizer(held: dict[str, Any], checkpoint: Checkpoint, target: Target) -> None:
    """Name the class that transformers takes for the source, where it looks the model type up: of ours it knows none.

    Of some types (OLMo 2, Phi-3) it reads tokenizer.json as it stands, whatever class a file names, which would cut words in
    another way; of some it knows that files name another class than theirs.
    """
    origin = checkpoint.origin
    own = (
        origin.model_type if origin is not None and origin.model_type in TOKENIZER_MAPPING_NAMES else target.model_type
    )
    registered = TOKENIZER_MAPPING_NAMES.get(own)
    named = held.get("tokenizer_class") or checkpoint.config.get("tokenizer_class")
    if (
        registered is None
        or "auto_map" in held
        or (named or "").removesuffix("Fast") == registered.removesuffix("Fast")
    ):
        return
    if not named:
        held["tokenizer_class"] = registered
    elif registered in _BACKENDS and not any(path.name == "tekken.json" for path in checkpoint.files):
        held["tokenizer_class"] = "TokenizersBackend"
    elif own in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        held["tokenizer_class"] = registered


def _separator(checkpoint: Checkpoint, carried: list[PurePosixPath]) -> int | None:
    """Return the id of the tokenizer's separator, for a config that does not name it."""
    inner = PurePosixPath(checkpoint.inner)
    has_one = any(path.parent == inner and path.name in VOCABULARIES for path in carried)
    if not has_one or checkpoint.config.get("sep_token_id") is not None:
        return None
    try:
        separator = AutoTokenizer.from_pretrained(checkpoint.folder, local_files_only=True).sep_token_id
    except Exception as error:
        # a tokenizer may need a library that is not here: it is carried along unread
        warnings.warn(f"the tokenizer could not be read ({error}), so sep_token_id stays unset", stacklevel=2)
        return None
    return separator if isinstance(separator, int) else None
