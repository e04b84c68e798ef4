"""Safetensors files, read by their headers and written tensor by tensor, so that no weights are held in memory."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hf_sparse.errors import ConversionError, UnfinishedConversionError

# bits of one number, by the format's name of its type
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# types whose numbers can be computed with
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# what the format's own reader accepts
_MOST_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: of the tensor.
        dtype: of its numbers, as the format names it ("F32", "BF16" ...).
        shape: of the tensor.
        path: of the file that holds it.
        start: its first byte in the file.
        stop: the byte behind its last.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def numbers(self) -> int:
        """How many numbers the tensor holds."""
        return prod(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, a few megabytes at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.stop - self.start
            while left:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise UnfinishedConversionError(
                        f"{self.path} became shorter while {self.name} was read; nothing was left at the destination; run "
                        "the conversion again"
                    )
                left -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Shard:
    """One safetensors file.

    Attributes:
        path: of the file.
        metadata: the file's own notes, such as ``{"format": "pt"}``.
        tensors: what it holds, in the order of its bytes.
    """

    path: Path
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]


@dataclass(frozen=True)
class Piece:
    """A tensor that is to be written.

    Attributes:
        name: of the tensor.
        dtype: of its numbers, as the format names it.
        shape: of the tensor.
        size: its length, in bytes.
        chunks: yields its bytes in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    chunks: Callable[[], Iterator[bytes]]


def read_shard(path: Path) -> Shard:
    """Read the header of a safetensors file and check it against the size of the file.

    Raises:
        ConversionError: if the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= _MOST_HEADER_BYTES:
            raise ConversionError(_broken(path, f"its header claims {length} bytes"))
        if 8 + length > size:
            raise ConversionError(_broken(path, f"its header alone needs {8 + length} bytes and the file has {size}"))
        raw = file.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        metadata = dict(header.pop("__metadata__", None) or {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its notes are no texts")
        tensors = [_stored(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(_broken(path, f"its header cannot be read: {error}")) from error
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_extent(path, tensors, 8 + length, size)
    return Shard(path, metadata, tuple(tensors))


def _stored(name: str, entry: dict[str, Any], path: Path, data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    return StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), path, data + start, data + stop)


def _check_extent(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    at = data
    for tensor in tensors:
        if tensor.start != at or tensor.stop < tensor.start:
            raise ConversionError(_broken(path, f"tensor {tensor.name} does not follow the one before it"))
        bits = _BITS.get(tensor.dtype)
        if bits is None:
            raise ConversionError(_broken(path, f"tensor {tensor.name} is of an unknown type, {tensor.dtype}"))
        if 8 * (tensor.stop - tensor.start) != bits * tensor.numbers:
            raise ConversionError(_broken(path, f"tensor {tensor.name} does not have the bytes of its shape"))
        at = tensor.stop
    if at != size:
        raise ConversionError(_broken(path, f"its header describes {at} bytes and the file has {size}"))


def _broken(path: Path, fault: str) -> str:
    return f"{path} is truncated or is no safetensors file: {fault}; fetch or save it again"


def header_of(pieces: list[Piece], metadata: dict[str, str]) -> tuple[bytes, list[Piece]]:
    """Return the head of a file that holds the pieces, and the pieces in the order of the file.

    The widest types come first, so that every tensor lies aligned, as the format's own writer has it.
    """
    ordered = sorted(pieces, key=lambda piece: (-_BITS.get(piece.dtype, 0), piece.name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for piece in ordered:
        header[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [at, at + piece.size],
        }
        at += piece.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def write_shard(
    path: Path, pieces: list[Piece], metadata: dict[str, str], on_bytes: Callable[[int], None] = lambda count: None
) -> str:
    """Write a safetensors file, and return its SHA-256.

    Args:
        path: of the file; must not exist.
        pieces: what it holds.
        metadata: the file's own notes.
        on_bytes: told the number of bytes after each write.
    """
    head, ordered = header_of(pieces, metadata)
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def write(chunk: bytes) -> None:
            write_bytes(file, chunk)
            digest.update(chunk)
            on_bytes(len(chunk))

        write(head)
        for piece in ordered:
            for chunk in piece.chunks():
                write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def cut(held: memoryview) -> Iterator[bytes]:
    """Yield bytes that lie in memory, of numbers in one row, a few megabytes at a time."""
    for start in range(0, len(held), _CHUNK_BYTES):
        yield bytes(held[start : start + _CHUNK_BYTES])


def write_bytes(file: BinaryIO, chunk: bytes) -> None:
    """Write bytes; every byte of the weights goes through here."""
    file.write(chunk)
