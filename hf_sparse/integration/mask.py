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
        window: the model's own sliding window: keys less than that many tokens away are read; None where it has none.
        query_index: int64 ``[T]``, where the queries stand in the padded row; None where they are the last ones.
        key_index: int64 ``[S]``, where the keys stand, given with ``query_index``.
        first: int64 ``[B, 1]``, where the first real token stands, given with ``query_index``; None where that is 0.
        may_be_packed: whether rows may hold several documents that ``document_ids`` does not tell.
    """

    padding: Tensor | None
    is_causal: bool
    document_ids: Tensor | None = None
    refusal: str | None = None
    window: int | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    first: Tensor | None = None
    may_be_packed: bool = False

    def to(self, *args: Any, **kwargs: Any) -> "SparseMask":
        """Return the mask with its tensors moved, as ``Tensor.to`` would (dtypes stay)."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in held.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)

    def positions(self, batch: int, *, from_first: bool) -> tuple[Tensor | None, Tensor | None]:
        """Return the logical positions of queries ``[B, T]`` and keys ``[B, S]``; two Nones where they follow from the shapes.

        Args:
            batch: rows.
            from_first: whether positions count from the first real token of a row, not from its edge.
        """
        if self.query_index is None or self.key_index is None:
            return None, None
        first = 0 if self.first is None or not from_first else self.first
        queries, keys = (index.expand(batch, -1) - first for index in (self.query_index, self.key_index))
        return queries, keys


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What a mask function of transformers says."""

    is_causal: bool = False
    document_ids: Tensor | None = None
    window: int | None = None
    refusal: str | None = None
    may_be_packed: bool = False


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
    device: torch.device | str | None = None,
    **given: Any,
) -> SparseMask:
    """Make the mask of one forward pass; registered with transformers' ``AttentionMaskInterface``.

    Args:
        batch_size: rows.
        q_length: queries of this pass.
        kv_length: keys of this pass.
        q_offset: index of the first query; a tensor where the cache is static.
        kv_offset: index of the first key, above 0 where the cache of a sliding window has dropped some.
        mask_function: transformers' rule; causality, a sliding window and packing are read from it.
        attention_mask: bool ``[B, tokens so far]``, True = a real token.
        local_size: the model's own sliding window or chunk.
        device: where the tokens are.
        given: what else transformers tells masks: whether the rule was changed, and which could be left out.

    Returns:
        The mask. What cannot be honoured is told by the layer that would have to, since a dense layer may.
    """
    rule = (_read_unopened(mask_function, local_size, given) if torch.compiler.is_compiling() else None) or _read(
        mask_function
    )
    refusal = rule.refusal
    if local_size is not None and rule.window is None:
        refusal = f"the model's own sliding window or chunk of {local_size} tokens"
    padding, end = attention_mask, kv_offset + kv_length
    if padding is not None and padding.shape[-1] < end:
        padding = torch.nn.functional.pad(padding, (0, end - padding.shape[-1]))
    mask = SparseMask(
        padding,
        rule.is_causal,
        rule.document_ids,
        refusal,
        rule.window,
        # transformers looks at positions in this case alone
        may_be_packed=rule.may_be_packed
        and attention_mask is None
        and not isinstance(q_offset, Tensor)
        and q_length == kv_length,
    )
    # where the queries are the last keys and no key was dropped, the shapes say all
    is_told = not rule.is_causal or (
        not isinstance(q_offset, Tensor) and not kv_offset and q_offset + q_length == kv_length
    )
    return mask if is_told else _placed(mask, batch_size, q_offset, q_length, kv_offset, kv_length, device)


def _placed(
    mask: SparseMask,
    batch: int,
    q_offset: int | Tensor,
    q_length: int,
    kv_offset: int,
    kv_length: int,
    device: torch.device | str | None,
) -> SparseMask:
    """Return a mask that says where queries and keys stand, and that keys not written yet are no tokens."""
    keys = torch.arange(kv_offset, kv_offset + kv_length, device=device)
    is_written = (keys < q_offset + q_length).expand(batch, -1)
    first, real = None, is_written
    if mask.padding is not None:
        first = mask.padding.int().argmax(1, keepdim=True)
        real = mask.padding[:, kv_offset : kv_offset + kv_length] & is_written
    queries = torch.arange(q_length, device=device) + q_offset
    return dataclasses.replace(mask, padding=real, query_index=queries, key_index=keys, first=first)


def _read(function: Callable[..., Any]) -> _Rule:
    """Return what a mask function says, and what in it is foreign to us."""
    if function is causal_mask_function:
        return _Rule(is_causal=True)
    if function is bidirectional_mask_function:
        return _Rule()
    name = function.__qualname__
    held = dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )
    if name.startswith("and_masks.") and "mask_functions" in held:
        read = [_read(part) for part in held["mask_functions"]]
        return _Rule(
            any(rule.is_causal for rule in read),
            next((rule.document_ids for rule in read if rule.document_ids is not None), None),
            next((rule.window for rule in read if rule.window is not None), None),
            next((rule.refusal for rule in read if rule.refusal is not None), None),
        )
    if name.startswith("packed_sequence_mask_function."):
        return _Rule(document_ids=held["packed_sequence_mask"])
    if name.startswith("remap_positions_for_packed_sequence."):
        return _read(held["mask_function"])
    if name.startswith("sliding_window_overlay."):
        return _Rule(window=int(held["sliding_window"]))
    if name.startswith("sliding_window_bidirectional_overlay."):
        # this one counts how far the farthest key is
        return _Rule(window=int(held["sliding_window"]) + 1)
    return _Rule(refusal=f"the mask function {name}")


def _read_unopened(function: Callable[..., Any], local_size: int | None, given: dict[str, Any]) -> _Rule | None:
    """Return what a mask function says by what transformers calls it with; None where that does not tell.

    Compilers do not look into the functions that one is made of.
    """
    if function is causal_mask_function or function is bidirectional_mask_function:
        return None
    is_chunked = getattr(given.get("config"), "attention_chunk_size", None) is not None
    if given.get("use_vmap", True) or is_chunked or not function.__qualname__.startswith("and_masks."):
        return None
    if "allow_is_bidirectional_skip" in given:
        return _Rule(window=None if local_size is None else int(local_size) + 1)
    return _Rule(is_causal=True, window=local_size, may_be_packed=not given.get("allow_is_causal_skip"))


def documents_of(position_ids: Tensor, batch: int, tokens: int, *, at_every_step: bool = False) -> Tensor | None:
    """Return documents where the positions run in several stretches that all start at the same number, else one.

    Args:
        position_ids: int ``[B or 1, S]``.
        batch: rows.
        tokens: of a row.
        at_every_step: begin a document wherever positions do not go up by one, as transformers does in causal masks.

    Returns:
        int64 ``[B, S]``; None where the positions are not of such rows.
    """
    if position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return None
    first = position_ids[:, :1]
    starts = torch.diff(position_ids, dim=1, prepend=first - 1) != 1
    if at_every_step:
        return starts.cumsum(1).expand(batch, -1)
    is_packed = (~starts | (position_ids == first)).all()
    return ((starts & is_packed).cumsum(1)).expand(batch, -1)
