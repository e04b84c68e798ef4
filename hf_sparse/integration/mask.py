"""The mask that our attention function receives: what transformers knows of a batch, in O(N)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function


@dataclasses.dataclass(frozen=True)
class SparseMask:
    """What a batch allows, before any pattern.

    Attributes:
        padding: bool ``[B, S]``, True = a real token; None where all are.
        is_causal: whether keys ahead of the query are left out.
        document_ids: int64 ``[B, S]`` of packed rows, or None.
        refusal: why this mask cannot be honoured, or None.
    """

    padding: Tensor | None
    is_causal: bool
    document_ids: Tensor | None = None
    refusal: str | None = None

    def to(self, *args: Any, **kwargs: Any) -> "SparseMask":
        """Return the mask with its tensors moved, as ``Tensor.to`` would (dtypes stay)."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        padding = None if self.padding is None else self.padding.to(device)
        document_ids = None if self.document_ids is None else self.document_ids.to(device)
        return dataclasses.replace(self, padding=padding, document_ids=document_ids)


def sparse_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **_kwargs: Any,
) -> SparseMask:
    """Make the mask of one forward pass; registered with transformers' ``AttentionMaskInterface``.

    Args:
        batch_size: rows.
        q_length: queries of this pass.
        kv_length: keys of this pass.
        q_offset: index of the first query.
        kv_offset: index of the first key.
        mask_function: transformers' rule; causality and packing are read from it.
        attention_mask: bool ``[B, S]``, True = a real token.
        local_size: the model's own sliding window or chunk.

    Returns:
        The mask. What cannot be honoured is told by the layer that would have to, since a dense layer may.
    """
    is_causal, document_ids, refusal = _read(mask_function)
    if local_size is not None:
        refusal = f"the model's own sliding window or chunk of {local_size} tokens"
    elif isinstance(q_offset, Tensor):
        refusal = "a static cache"
    elif kv_offset:
        refusal = "a cache that has dropped keys"
    padding = attention_mask
    if padding is not None and padding.shape[-1] < kv_length:
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[-1]))
    return SparseMask(padding, is_causal, document_ids, refusal)


def _read(function: Callable[..., Any]) -> tuple[bool, Tensor | None, str | None]:
    """Return whether a mask function is causal, the documents it separates, and what in it is foreign to us."""
    if function is causal_mask_function:
        return True, None, None
    if function is bidirectional_mask_function:
        return False, None, None
    name = function.__qualname__
    held = dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )
    if name.startswith("and_masks.") and "mask_functions" in held:
        read = [_read(part) for part in held["mask_functions"]]
        documents = next((ids for _, ids, _ in read if ids is not None), None)
        return any(causal for causal, _, _ in read), documents, next((why for *_, why in read if why), None)
    if name.startswith("packed_sequence_mask_function."):
        return False, held["packed_sequence_mask"], None
    if name.startswith("remap_positions_for_packed_sequence."):
        return _read(held["mask_function"])
    return False, None, f"the mask function {name}"
