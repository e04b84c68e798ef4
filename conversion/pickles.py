"""Weights that ``torch.save`` wrote, read as if they lay in safetensors files."""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.conversion.shards import Shard, StoredTensor, cut
from hf_sparse.errors import ConversionError

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PickledTensor(StoredTensor):
    """A tensor of a pickle; ``start`` and ``stop`` say its length alone.

    Attributes:
        is_shared: whether the file has the same numbers under another name too.
    """

    is_shared: bool = False

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, a few megabytes at a time."""
        tensor = _opened(self.path, self.path.stat().st_mtime_ns)[self.name]
        yield from cut(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_pickle(path: Path) -> Shard:
    """Read which tensors a pickle holds; nothing but tensors is unpickled, so no code of it runs.

    Raises:
        ConversionError: if it holds anything else, or was written before torch 1.6.
    """
    try:
        held = _opened(path, path.stat().st_mtime_ns)
    # torch raises one of several kinds for what it does not unpickle, and for a file that is cut short
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConversionError(
            f"{path} cannot be read as a pickle of tensors ({reason}); load it with transformers and save it again: "
            "save_pretrained writes safetensors"
        ) from error
    tensors = []
    places = Counter(_place(tensor) for tensor in held.values()) if isinstance(held, dict) else Counter()
    for name, tensor in held.items() if isinstance(held, dict) else ():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            raise ConversionError(
                f"{path}: {name} is no tensor of a known type, got {getattr(tensor, 'dtype', type(tensor))}"
            )
        kind, is_shared = _DTYPES[tensor.dtype], places[_place(tensor)] > 1
        tensors.append(PickledTensor(name, kind, tuple(tensor.shape), path, 0, tensor.nbytes, is_shared))
    if not tensors:
        raise ConversionError(f"{path} holds no tensors by name; save the checkpoint again")
    return Shard(path, {"format": "pt"}, tuple(tensors))


def _place(tensor: Any) -> Any:
    """Return where the numbers of a tensor lie."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if isinstance(tensor, Tensor) else id(tensor)


@functools.lru_cache(maxsize=1)
def _opened(path: Path, changed: int) -> Any:
    """Return what a pickle holds, its tensors mapped from the file; one file at a time stays mapped.

    Args:
        path: of the file.
        changed: when it was, so that a new file of that name is opened anew.
    """
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
