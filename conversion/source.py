"""Finding a checkpoint and checking that it is whole."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_sparse.conversion import lsg
from hf_sparse.conversion.hub import download
from hf_sparse.conversion.in_tree import KIN, Origin, read_as_dense
from hf_sparse.conversion.pickles import PICKLE, PICKLE_INDEX, read_pickle
from hf_sparse.conversion.shards import Shard, StoredTensor, read_shard
from hf_sparse.errors import ConversionError, UnsupportedModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FOREIGN = ("tf_model.h5", "flax_model.msgpack")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole, as a dense one.

    Attributes:
        name: what the caller called it; of the Hub's, with the commit.
        root: its folder.
        inner: where the transformer lies in it: "" or, as in older sentence-transformers' checkpoints, "0_Transformer".
        config: what config.json holds; of a sparse checkpoint of transformers' own, what its dense kin's would hold.
        shards: its weights, under the names of the dense type.
        index: what the index of its shards holds; None where there is one file.
        files: every file, as paths relative to ``root``.
        is_from_hub: whether it was downloaded.
        unfetched: files of the Hub's that were not.
        origin: what it was before it was read as a dense one; None where it is dense.
    """

    name: str
    root: Path
    inner: str
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: dict[str, Any] | None
    files: tuple[PurePosixPath, ...]
    is_from_hub: bool
    unfetched: tuple[str, ...]
    origin: Origin | None = None

    @property
    def folder(self) -> Path:
        """The folder with config.json and the weights."""
        return self.root / self.inner

    def check_dense(self, what: str) -> None:
        """Refuse what runs the dense class on the source's folder.

        Raises:
            ConversionError: if it is a sparse checkpoint of transformers' own.
        """
        if self.origin is not None:
            raise ConversionError(
                f"{what} needs a dense source, and {self.name} is a {self.origin.model_type}; leave it out, or pass the dense "
                "checkpoint that it came from"
            )

    @property
    def is_pickled(self) -> bool:
        """Whether its weights lie in what ``torch.save`` wrote."""
        return any(shard.path.suffix == ".bin" for shard in self.shards)

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor, by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Find a checkpoint and check it; a sparse one of transformers' own is read as its dense kin.

    Args:
        source: a folder, or the id of a model on the Hub.
        revision: branch, tag or commit, of the Hub's.
        token: for the Hub; None takes the one that was logged in with.
        allow_pickle: whether weights that are only there as ``pytorch_model.bin`` are read.

    Raises:
        ConversionError: if it is no checkpoint, is not whole, brings code of its own or is sparse already.
    """
    root, name, is_from_hub, unfetched = locate(source, revision, token, allow_pickle=allow_pickle)
    files = tuple(sorted(files_of(root)))
    inner = _transformer_folder(root)
    folder = root / inner
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        way_out = "merge the adapter into its model and save that" if is_adapter else "pass the folder that holds it"
        raise ConversionError(f"{name} is not a checkpoint: {folder} holds no config.json; {way_out}")
    config = read_json(folder / "config.json")
    _check_config(name, folder, config)
    if "sparse_attention" in config or str(config.get("model_type", "")).startswith("sparse_"):
        raise ConversionError(
            f"{name} is sparse already (model_type {config.get('model_type')!r}); load it as it is, or convert the dense "
            "checkpoint it came from with another pattern"
        )
    _check_code(name, folder, config)
    if config.get("quantization_config") is not None:
        raise ConversionError(
            f"{name} is quantized (quantization_config in config.json), and conversion copies plain weights; convert the "
            "checkpoint it was made from"
        )
    shards, index = _read_weights(name, folder, unfetched, allow_pickle=allow_pickle)
    for path in files:
        if not os.access(root / path, os.R_OK):
            raise ConversionError(f"{root / path} may not be read; change its permissions")
    return _as_dense(Checkpoint(name, root, inner, config, shards, index, files, is_from_hub, unfetched))


def _as_dense(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as the dense one that it is but for its attention; one that is dense as it is."""
    if lsg.is_lsg(checkpoint.config):
        return _lsg_as_dense(checkpoint)
    kin = KIN.get(str(checkpoint.config.get("model_type")))
    if kin is None:
        return checkpoint
    config = read_config(checkpoint)
    origin, held = read_as_dense(checkpoint.name, kin, config)
    # a config object forgets what it says of generation
    of_generation = GenerationConfig().to_dict().keys() - {"transformers_version"}
    held |= {key: value for key, value in checkpoint.config.items() if key in of_generation and key not in held}
    shards = tuple(
        dataclasses.replace(
            shard, tensors=tuple(new for held in shard.tensors for new in kin.dense_tensors(held, config))
        )
        for shard in checkpoint.shards
    )
    return dataclasses.replace(checkpoint, config=held, shards=shards, origin=origin)


def _lsg_as_dense(checkpoint: Checkpoint) -> Checkpoint:
    origin, held = lsg.read_as_dense(checkpoint.name, checkpoint.config)
    dense = dataclasses.replace(checkpoint, config=held, origin=origin)
    count = origin.pattern.num_nodes(1)  # type: ignore[union-attr]
    made = lsg.dense_tensors(checkpoint.name, checkpoint.tensors, count, read_config(dense))
    shards = tuple(
        dataclasses.replace(shard, tensors=tuple(made.get(tensor.name, tensor) for tensor in shard.tensors))
        for shard in checkpoint.shards
    )
    return dataclasses.replace(dense, shards=shards)


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return the config of a checkpoint.

    Raises:
        UnsupportedModelError: if this transformers has no such model type.
        ConversionError: if it cannot be read.
    """
    model_type = checkpoint.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        said = f"names the model type {model_type!r}, which" if model_type else "names no model_type, which"
        raise UnsupportedModelError(
            f"{checkpoint.name}: config.json {said} this transformers ({transformers.__version__}) cannot load; "
            "hf-sparse support lists what converts"
        )
    try:
        if checkpoint.origin is not None:
            config: PreTrainedConfig = CONFIG_MAPPING[str(model_type)].from_dict(checkpoint.config)
            return config
        read = AutoConfig.from_pretrained(checkpoint.folder)
        # whatever attention it names is not what it will have
        read._attn_implementation_internal = None
        return read
    # a field of a wrong type raises one of several classes of huggingface_hub's
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ConversionError(
            f"{checkpoint.folder / 'config.json'} cannot be read as a {model_type} config: {' '.join(reason)[:300]}"
        ) from error


def locate(
    source: str | os.PathLike[str], revision: str | None, token: str | bool | None, *, allow_pickle: bool
) -> tuple[Path, str, bool, tuple[str, ...]]:
    """Return the folder of a source, its name, whether it is the Hub's, and what was not downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConversionError(f"revision {revision!r} is for the Hub, but {source} is a local folder; leave it out")
        return path.resolve(), str(source), False, ()
    if path.exists():
        raise ConversionError(f"{source} is a file; pass the folder of the checkpoint")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ConversionError(f"{source} is not a checkpoint: there is no such folder, and it is no id of the Hub's")
    folder, name, unfetched = download(source, revision=revision, token=token, allow_pickle=allow_pickle)
    return folder, name, True, unfetched


def files_of(root: Path) -> Iterator[PurePosixPath]:
    """Yield every file below a folder; links are followed, each folder once."""
    seen = set()
    for folder, inner, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            inner.clear()
            continue
        seen.add(here)
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield PurePosixPath(path.relative_to(root).as_posix())


def _check_config(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Check what a config.json says of classes, and that no adapter lies beside it."""
    architectures = config.get("architectures")
    is_list = isinstance(architectures, list) and all(isinstance(one, str) for one in architectures)
    if not isinstance(config.get("model_type", ""), str) or not (architectures is None or is_list):
        raise ConversionError(
            f"{folder / 'config.json'}: model_type has to be a text and architectures a list of texts; fetch or save it again"
        )
    if (folder / "adapter_config.json").is_file():
        raise ConversionError(
            f"{name} holds an adapter (adapter_config.json), which a conversion would leave out; merge it into its model and "
            "save that, or remove it"
        )


def _transformer_folder(root: Path) -> str:
    """Return where sentence-transformers' list of modules puts the transformer; "" where there is no such list."""
    if not (root / "modules.json").is_file():
        return ""
    modules = read_json(root / "modules.json", kind=list)
    if not all(isinstance(module, dict) for module in modules):
        raise ConversionError(f"{root / 'modules.json'} does not list modules as objects; fetch the checkpoint again")
    found = [module.get("path", "") for module in modules if str(module.get("type", "")).endswith(".Transformer")]
    if not found:
        return ""
    inner = str(found[0])
    if Path(inner).is_absolute() or ".." in Path(inner).parts:
        raise ConversionError(f"{root / 'modules.json'} puts the transformer at {inner!r}, outside the checkpoint")
    return inner


def _check_code(name: str, folder: Path, config: dict[str, Any]) -> None:
    tokenizer = folder / "tokenizer_config.json"
    # what LSG brings is not needed
    held = [] if lsg.is_lsg(config) else [("config.json", config)]
    if tokenizer.is_file():
        held.append(("tokenizer_config.json", read_json(tokenizer)))
    for file, values in held:
        if values.get("auto_map"):
            raise ConversionError(
                f"{name} brings code of its own (auto_map in {file}, loaded with trust_remote_code), which conversion never "
                "runs; convert a checkpoint of a model type that transformers has"
            )


def _read_weights(
    name: str, folder: Path, unfetched: tuple[str, ...], *, allow_pickle: bool
) -> tuple[tuple[Shard, ...], dict[str, Any] | None]:
    if (folder / WEIGHTS).is_file():
        return (read_shard(folder / WEIGHTS),), None
    if (folder / INDEX).is_file():
        return _read_shards(name, folder, INDEX, read_shard)
    stray = sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))
    if stray:
        raise ConversionError(f"{name} has {stray[0]} but no {INDEX}; fetch or save the checkpoint again")
    if allow_pickle and (folder / PICKLE).is_file():
        return (read_pickle(folder / PICKLE),), None
    if allow_pickle and (folder / PICKLE_INDEX).is_file():
        return _read_shards(name, folder, PICKLE_INDEX, read_pickle)
    others = [file for file in (PICKLE, PICKLE_INDEX, *_FOREIGN) if (folder / file).exists() or file in unfetched]
    if others:
        by_name = ", or pass allow_pickle=True (--allow-pickle)" if others[0] in (PICKLE, PICKLE_INDEX) else ""
        raise ConversionError(
            f"{name} has its weights only as {others[0]}, which conversion does not read (a pickle may run code); load "
            f"it with transformers and save it again: save_pretrained writes safetensors{by_name}"
        )
    raise ConversionError(f"{name} is not a checkpoint: {folder} holds no weights ({WEIGHTS} or {INDEX})")


def _read_shards(
    name: str, folder: Path, index_name: str, read: Callable[[Path], Shard]
) -> tuple[tuple[Shard, ...], dict[str, Any]]:
    index: dict[str, Any] = read_json(folder / index_name)
    held = index.get("weight_map")
    weight_map: dict[str, Any] = held if isinstance(held, dict) else {}
    are_files = bool(weight_map) and all(isinstance(file, str) for file in weight_map.values())
    if not are_files or not isinstance(index.setdefault("metadata", {}), dict):
        raise ConversionError(
            f"{folder / index_name} has no weight_map from tensors to files, or metadata that is none; fetch or save the "
            "checkpoint again"
        )
    shards = []
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise ConversionError(f"{name} lacks the shard {file} that its index names; fetch the checkpoint again")
        shard = read(folder / file)
        there = {tensor.name for tensor in shard.tensors}
        lacking = sorted(key for key, place in weight_map.items() if place == file and key not in there)
        if lacking:
            raise ConversionError(
                f"{folder / file} lacks {_some(lacking)}, which the index says it holds; fetch it again"
            )
        shards.append(shard)
    return tuple(shards), index


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def read_json(path: Path, kind: type = dict) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConversionError: if it is not JSON or not of the kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise ConversionError(
            f"{path} must hold a JSON {'object' if kind is dict else 'list'}, got {type(value).__name__}"
        )
    return value
