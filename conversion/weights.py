"""Which tensors are carried, tiled, added and dropped, shard by shard."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.conversion.names import Spelling
from hf_sparse.conversion.pickles import PICKLE_INDEX, PickledTensor
from hf_sparse.conversion.report import Count
from hf_sparse.conversion.shards import FLOATS, Piece, StoredTensor, cut, header_of
from hf_sparse.conversion.source import INDEX, Checkpoint
from hf_sparse.conversion.target import Target
from hf_sparse.errors import ConversionError
from hf_sparse.integration.positions import longer_table, only_moves_rows

_NODES = "sparse_nodes."


@dataclass(frozen=True)
class PlannedShard:
    """A weights file of the destination.

    Attributes:
        name: of the file.
        pieces: the tensors it will hold.
        metadata: the file's own notes.
    """

    name: str
    pieces: list[Piece]
    metadata: dict[str, str]

    @property
    def size(self) -> int:
        """Length of the file, in bytes."""
        return len(header_of(self.pieces, self.metadata)[0]) + sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class PlannedWeights:
    """All weights files of the destination.

    Attributes:
        shards: the files.
        index: what the index of the shards is to hold; None where there is one file.
        moved: tensors that stay as they are.
        tiled: tables of positions that become longer, with the numbers they then have.
        added: tensors that start as copies or as zeros, and centroids that were calibrated.
        dropped: tensors that are left out.
    """

    shards: list[PlannedShard]
    index: dict[str, Any] | None
    moved: Count
    tiled: Count
    added: Count
    dropped: Count


def plan_weights(
    checkpoint: Checkpoint, target: Target, centroids: Mapping[str, Tensor] | None = None
) -> PlannedWeights:
    """Say what becomes of every tensor.

    Args:
        checkpoint: the source.
        target: what it becomes.
        centroids: holds what ``target.centroids`` names by the time that the shards are written; None adds nothing of it.

    Raises:
        ConversionError: if the checkpoint lacks a tensor that is needed, or one has an unexpected shape.
    """
    spelling = Spelling(checkpoint.tensors, target.renamings, target.base_prefix)
    _check_whole(checkpoint, target, spelling)
    copies = _copies(checkpoint, target, spelling)
    kept = {spelling.find(new) for new in (*target.copies, *target.fresh)}
    tied = {spelling.find(name) for name in target.tied}
    beside = spelling.stored.get(spelling.find(target.beside) or "")
    made: dict[str, list[int]] = {kind: [] for kind in ("moved", "tiled", "added", "dropped")}
    shards = []
    for shard in checkpoint.shards:
        pieces = []
        for tensor in shard.tensors:
            # a sparse source may hold weights of a pattern that the destination has not
            is_unused = (".sparse_state." in tensor.name or _NODES in tensor.name) and tensor.name not in kept
            if target.is_buffer(tensor.name) or is_unused:
                made["dropped"].append(tensor.numbers)
                continue
            # safetensors have such once
            if isinstance(tensor, PickledTensor) and tensor.is_shared and tensor.name in tied:
                continue
            is_tiled = target.is_table(tensor.name) and target.length > target.length_before
            pieces.append(_lengthen(tensor, checkpoint, target) if is_tiled else _carry(tensor, tensor.name))
            made["tiled" if is_tiled else "moved"].append(prod(pieces[-1].shape))
            added = [_carry(tensor, name) for name in copies.get(tensor.name, ())]
            if tensor.name == beside:
                if centroids is not None:
                    added += _centroids(tensor, target, spelling, centroids)
                added += _fresh(tensor, target, spelling)
            made["added"] += [prod(piece.shape) for piece in added]
            pieces += added
        shards.append(PlannedShard(_name_of(shard.path.name), pieces, shard.metadata))
    counts = {kind: Count(len(numbers), sum(numbers)) for kind, numbers in made.items()}
    return PlannedWeights(shards, _index(checkpoint, shards), **counts)


def _copies(checkpoint: Checkpoint, target: Target, spelling: Spelling) -> dict[str, list[str]]:
    """Return, for each tensor of the source that is copied, the names of its copies, in the source's way of naming.

    A sparse checkpoint of transformers' own has some of them already.
    """
    copies: dict[str, list[str]] = {}
    for new, origin in target.copies.items():
        if spelling.find(new) is not None:
            continue
        found = spelling.find(origin)
        if found is None:
            raise ConversionError(f"{checkpoint.name} lacks the tensor {origin}, which {new} would start as a copy of")
        copies.setdefault(spelling.stored[found], []).append(spelling.spell(new, like=origin))
    return copies


def _check_whole(checkpoint: Checkpoint, target: Target, spelling: Spelling) -> None:
    """Check that the base model is all there, and that every weight that is there has the shape of the config."""
    tensors = checkpoint.tensors
    is_bare = not any(name.startswith(target.base_prefix) for name in target.shapes)
    lacking = []
    for name, shape in target.shapes.items():
        found = spelling.find(name)
        if found is not None:
            held = tensors[spelling.stored[found]]
            if held.shape != shape and found not in spelling.cut:
                raise ConversionError(
                    f"{checkpoint.name}: {held.name} has shape {list(held.shape)}, but by config.json it has {list(shape)}; "
                    "set the config right"
                )
        # a head may start anew, and so may the pooler that some heads have; sines need not be stored
        elif (is_bare or name.startswith(target.base_prefix)) and not (
            "pooler." in name or name in target.tied or (target.has_sines and target.is_table(name))
        ):
            lacking.append(name)
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise ConversionError(
            f"{checkpoint.name} lacks the tensor {lacking[0]}{more}; it is not a whole {target.dense_class.__name__} checkpoint"
        )


def _carry(tensor: StoredTensor, name: str) -> Piece:
    return Piece(name, tensor.dtype, tensor.shape, tensor.stop - tensor.start, tensor.chunks)


def _fresh(tensor: StoredTensor, target: Target, spelling: Spelling) -> Iterator[Piece]:
    """Yield the weights that start as zeros, in the type of the tensor beside which they are named."""
    for name, shape in target.fresh.items():
        if spelling.find(name) is not None:
            continue
        size = (tensor.stop - tensor.start) // prod(tensor.shape) * prod(shape)
        zeros = functools.partial(_zeros, size)
        yield Piece(spelling.spell(name, like=target.beside), tensor.dtype, shape, size, zeros)


def _centroids(tensor: StoredTensor, target: Target, spelling: Spelling, held: Mapping[str, Tensor]) -> Iterator[Piece]:
    """Yield what a calibration set, in the type of the tensor beside which it is named."""
    kind = tensor.dtype if tensor.dtype in FLOATS else "F32"
    for name, shape in target.centroids.items():
        size = FLOATS[kind].itemsize * prod(shape)
        chunks = functools.partial(_bytes_of, held, name, FLOATS[kind])
        yield Piece(spelling.spell(name, like=target.beside), kind, shape, size, chunks)


def _bytes_of(held: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Iterator[bytes]:
    yield from cut(held[name].to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _zeros(size: int) -> Iterator[bytes]:
    yield bytes(size)


def _lengthen(tensor: StoredTensor, checkpoint: Checkpoint, target: Target) -> Piece:
    is_moved, shape = only_moves_rows(target.config), target.table_shape
    if not is_moved and tensor.dtype not in FLOATS:
        raise ConversionError(f"{checkpoint.name}: {tensor.name} has type {tensor.dtype}, which cannot be interpolated")
    size = (tensor.stop - tensor.start) // prod(tensor.shape) * prod(shape)

    def chunks() -> Iterator[bytes]:
        held = torch.frombuffer(bytearray().join(tensor.chunks()), dtype=torch.uint8)
        # as bytes where rows only move, so that every type is moved and none is rounded
        held = held.view(tensor.shape[0], -1) if is_moved else held.view(FLOATS[tensor.dtype]).view(tensor.shape)
        table = longer_table(held, target.dense_config, target.config)
        yield from cut(table.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    return Piece(tensor.name, tensor.dtype, shape, size, chunks)


def _index(checkpoint: Checkpoint, shards: list[PlannedShard]) -> dict[str, Any] | None:
    if checkpoint.index is None:
        return None
    pieces = [(piece, shard.name) for shard in shards for piece in shard.pieces]
    metadata = {**(checkpoint.index.get("metadata") or {}), "total_size": sum(piece.size for piece, _ in pieces)}
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(prod(piece.shape) for piece, _ in pieces)
    weight_map = {piece.name: name for piece, name in sorted(pieces, key=lambda pair: pair[0].name)}
    return {**checkpoint.index, "metadata": metadata, "weight_map": weight_map}


def _name_of(shard: str) -> str:
    """Return what a file of the destination is called: as the source's, but for pickles, whose place safetensors take."""
    return shard.replace("pytorch_model", "model").replace(".bin", ".safetensors") if shard.endswith(".bin") else shard


def weight_files(checkpoint: Checkpoint) -> set[Path]:
    """Return the files of the source that hold its weights, with their index."""
    files = {shard.path for shard in checkpoint.shards}
    index = PICKLE_INDEX if checkpoint.is_pickled else INDEX
    return files if checkpoint.index is None else files | {checkpoint.folder / index}
