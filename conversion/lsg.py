"""Checkpoints of LSG: a dense model with global tokens, which brings code that no longer imports and is not needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

import hf_sparse
from hf_sparse.conversion.in_tree import Origin
from hf_sparse.conversion.shards import StoredTensor, cut
from hf_sparse.errors import ConversionError, UnsupportedModelError

# what a config of LSG says besides the dense one's
_FIELDS = (
    "block_size",
    "sparse_block_size",
    "sparsity_factor",
    "sparsity_type",
    "num_global_tokens",
    "pool_with_global",
)
_OTHERS = ("adaptive", "auto_map", "base_model_prefix", "lsh_num_pre_rounds", "mask_first_token")
# of which global tokens are put behind the embeddings as here
_KNOWN = ("bert", "camembert", "roberta", "xlm-roberta")
_TABLE = "embeddings.global_embeddings.weight"
_NORM = "embeddings.LayerNorm."
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_lsg(config: dict[str, Any]) -> bool:
    """Say whether a config.json is LSG's."""
    return config.get("base_model_prefix") == "lsg"


def read_as_dense(name: str, config: dict[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """Say what a checkpoint of LSG is, and what the config.json of the dense model holds that it otherwise is.

    Raises:
        UnsupportedModelError: if its model type or a setting of it cannot be read; says which.
    """
    model_type = config.get("model_type")
    if model_type not in _KNOWN:
        raise UnsupportedModelError(
            f"{name} is an LSG {model_type}, and only LSG checkpoints of {', '.join(_KNOWN)} can be read; convert the dense "
            "checkpoint it came from"
        )
    fields = {field: config[field] for field in _FIELDS if field in config}
    kind = fields.get("sparsity_type", "norm")
    if kind is None or not fields.get("sparse_block_size", 1) or not fields.get("sparsity_factor", 1):
        # no sparse tokens, by any of three ways of saying so
        fields = {**fields, "sparsity_type": "none", "sparse_block_size": 1, "sparsity_factor": 1}
    elif kind in ("lsh", "bos_pooling"):
        why = (
            "draws hashes anew in each pass" if kind == "lsh" else "reads padding where a group of tokens has no other"
        )
        raise UnsupportedModelError(f"{name} has sparsity_type {kind!r}, which {why}; it cannot be read")
    for field, why in (
        ("mask_first_token", "which no pattern here has"),
        ("is_decoder", "and its pattern cannot be causal"),
    ):
        if config.get(field):
            raise UnsupportedModelError(f"{name} has {field}, {why}; it cannot be read")
    pattern = hf_sparse.pattern("lsg", **fields)
    kept = pattern.block_size // pattern.sparsity_factor  # type: ignore[attr-defined]
    if pattern.sparsity_type != "none" and kept % 2:  # type: ignore[attr-defined]
        raise UnsupportedModelError(
            f"{name} keeps {kept} tokens of a block, an odd number, with which published code reads some tokens twice; it "
            "cannot be read"
        )
    held = {key: value for key, value in config.items() if key not in (*_FIELDS, *_OTHERS)}
    architectures = config.get("architectures") or ["LSGModel"]
    held["architectures"] = [one.removeprefix("LSG") for one in architectures]
    return Origin(f"LSG {model_type}", architectures[0], pattern, {}), held


@dataclass(frozen=True)
class NodeVectors(StoredTensor):
    """What global tokens start as: rows of a table, normed as embeddings are.

    Attributes:
        table: the table.
        weight: of the norm.
        bias: of the norm.
        eps: of the norm.
    """

    table: StoredTensor
    weight: StoredTensor
    bias: StoredTensor
    eps: float

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes."""
        rows, weight, bias = (_read(tensor).float() for tensor in (self.table, self.weight, self.bias))
        normed = torch.nn.functional.layer_norm(rows[: self.shape[0]], weight.shape, weight, bias, self.eps)
        yield from cut(normed.to(_DTYPES[self.dtype]).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read(tensor: StoredTensor) -> Tensor:
    held = torch.frombuffer(bytearray().join(tensor.chunks()), dtype=_DTYPES[tensor.dtype])
    return held.view(tensor.shape)


def dense_tensors(name: str, tensors: dict[str, StoredTensor], count: int, eps: float) -> dict[str, StoredTensor]:
    """Return what takes the place of tensors of an LSG checkpoint, by the name they have there.

    Args:
        name: of the checkpoint.
        tensors: all of them.
        count: global tokens.
        eps: of the norm of the embeddings.

    Raises:
        ConversionError: if one is missing.
    """
    found = [key for key in tensors if key.endswith(_TABLE)]
    prefix = found[0].removesuffix(_TABLE) if found else ""
    norm = [tensors.get(f"{prefix}{_NORM}{part}") for part in ("weight", "bias")]
    if not found or norm[0] is None or norm[1] is None or tensors[found[0]].shape[0] < count:
        raise ConversionError(f"{name} lacks {_TABLE} with {count} rows, or the norm that belongs to it")
    table = tensors[found[0]]
    shape = (count, *table.shape[1:])
    size = (table.stop - table.start) // table.shape[0] * count
    assert size == prod(shape) * _DTYPES[table.dtype].itemsize
    made = NodeVectors(
        f"{prefix}sparse_nodes.weight", table.dtype, shape, table.path, 0, size, table, norm[0], norm[1], eps
    )
    return {found[0]: made}
