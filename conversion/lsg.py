"""Checkpoints of LSG: a dense model with global tokens, which brings code that no longer imports and is not needed."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

import hf_sparse
from hf_sparse.conversion.in_tree import Origin
from hf_sparse.conversion.shards import FLOATS, StoredTensor, cut
from hf_sparse.errors import ConversionError, UnsupportedModelError

# what a config of LSG says besides the dense one's
_FIELDS = (
    "block_size",
    "sparse_block_size",
    "sparsity_factor",
    "sparsity_type",
    "num_global_tokens",
    "pool_with_global",
    "pass_global_tokens_to_decoder",
)
_OTHERS = ("adaptive", "auto_map", "base_model_prefix", "lsh_num_pre_rounds", "mask_first_token")


@dataclass(frozen=True)
class _Place:
    """Where a model type has what its global tokens start as.

    Attributes:
        table: name of the table, behind the prefix of the base model.
        norm: how the names of its norm begin.
        eps: of the norm; None where the config says it.
        projection: how the names begin of what comes behind the norm; "" for nothing.
        nodes: what stands before "sparse_nodes".
    """

    table: str = "embeddings.global_embeddings.weight"
    norm: str = "embeddings.LayerNorm."
    eps: float | None = None
    projection: str = ""
    nodes: str = ""


_OF_BERT = _Place()
_OF_BART = _Place("encoder.global_embeddings.weight", "encoder.layernorm_embedding.", 1e-5, nodes="encoder.")
_PLACES = {
    "albert": _Place(projection="encoder.embedding_hidden_mapping_in."),
    "bart": _OF_BART,
    "bert": _OF_BERT,
    "camembert": _OF_BERT,
    "distilbert": _Place(eps=1e-12),
    "electra": _Place(projection="embeddings_project."),
    "mbart": _OF_BART,
    "roberta": _OF_BERT,
    "xlm-roberta": _OF_BERT,
}


def is_lsg(config: dict[str, Any]) -> bool:
    """Say whether a config.json is LSG's."""
    return config.get("base_model_prefix") == "lsg"


def read_as_dense(name: str, config: dict[str, Any]) -> tuple[Origin, dict[str, Any]]:
    """Say what a checkpoint of LSG is, and what the config.json of the dense model holds that it otherwise is.

    Raises:
        UnsupportedModelError: if its model type or a setting of it cannot be read; says which.
    """
    model_type = config.get("model_type")
    if model_type not in _PLACES:
        raise UnsupportedModelError(
            f"{name} is an LSG {model_type}, and only LSG checkpoints of {', '.join(_PLACES)} can be read; convert the dense "
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
    """What global tokens start as: rows of a table, normed and projected as embeddings are.

    Attributes:
        table: the table.
        weight: of the norm.
        bias: of the norm.
        eps: of the norm.
        projection: weight and bias of what comes behind the norm; empty for nothing.
    """

    table: StoredTensor
    weight: StoredTensor
    bias: StoredTensor
    eps: float
    projection: tuple[StoredTensor, ...] = ()

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes."""
        rows, weight, bias = (_read(tensor).float() for tensor in (self.table, self.weight, self.bias))
        normed = torch.nn.functional.layer_norm(rows[: self.shape[0]], weight.shape, weight, bias, self.eps)
        if self.projection:
            normed = torch.nn.functional.linear(normed, *(_read(tensor).float() for tensor in self.projection))
        yield from cut(normed.to(FLOATS[self.dtype]).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read(tensor: StoredTensor) -> Tensor:
    held = torch.frombuffer(bytearray().join(tensor.chunks()), dtype=FLOATS[tensor.dtype])
    return held.view(tensor.shape)


def dense_tensors(name: str, tensors: dict[str, StoredTensor], count: int, config: Any) -> dict[str, StoredTensor]:
    """Return what takes the place of tensors of an LSG checkpoint, by the name they have there.

    Args:
        name: of the checkpoint.
        tensors: all of them.
        count: global tokens.
        config: of the dense model.

    Raises:
        ConversionError: if one is missing.
    """
    place = _PLACES[config.model_type]
    key = next((key for key in tensors if key.endswith(place.table)), place.table)
    prefix = key.removesuffix(place.table)
    norm, projection = (
        [tensors[own] for own in (f"{prefix}{start}weight", f"{prefix}{start}bias") if start and own in tensors]
        for start in (place.norm, place.projection)
    )
    table = tensors.get(key)
    if table is None or len(norm) < 2 or table.shape[0] < count:
        raise ConversionError(f"{name} lacks {place.table} with {count} rows, or the norm that belongs to it")
    eps = config.layer_norm_eps if place.eps is None else place.eps
    shape = (count, *(projection[0].shape[:1] if projection else table.shape[1:]))
    size = prod(shape) * FLOATS[table.dtype].itemsize
    own, (weight, bias) = f"{prefix}{place.nodes}sparse_nodes.weight", norm
    made = NodeVectors(
        own, table.dtype, shape, table.path, 0, size, table, weight, bias, eps, projection=tuple(projection)
    )
    return {key: made}
