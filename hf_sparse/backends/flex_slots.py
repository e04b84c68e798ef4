"""Attention over slots in one fused kernel of torch's FlexAttention, for CUDA; on the CPU uncompiled, for checking.

Queries and keys are laid out slot after slot, each filled up to whole blocks of the kernel, so that a block of queries reads
the blocks of its own slot's keys and no others. Who reads whom inside a slot is a table of a byte for each pair that stands in
a block, which the mask function looks up: so causality, repeated pairs and what other members of a union have need no code
of their own in the kernel. Outputs of a query that stands in several slots merge by logsumexp.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_sparse.backends.flex_blocks import BLOCK
from hf_sparse.backends.flex_runs import check_served, uncompiled
from hf_sparse.backends.kernels import without_autocast
from hf_sparse.backends.slot_calls import SlotCall
from hf_sparse.slots import Slots


class SlotLayout(NamedTuple):
    """Slots as the kernel reads them; all lanes have the same number of slots, of which some may hold nothing.

    Attributes:
        queries: int64 ``[L, X * T]``, places of queries; -1 holds none. T is a multiple of the kernel's block.
        keys: int64 ``[L, X * S]``, of keys.
        allowed: bool ``[L, X, T, S]``, who reads whom.
        counts: int32 ``[1, L, X * T / block]``, blocks of keys that each block of queries reads.
        indices: int32 ``[1, L, X * T / block, W]``, which.
        back_counts: int32 ``[1, L, X * S / block]``, the other way round.
        back_indices: int32 ``[1, L, X * S / block, W]``, likewise.
    """

    queries: Tensor
    keys: Tensor
    allowed: Tensor
    counts: Tensor
    indices: Tensor
    back_counts: Tensor
    back_indices: Tensor


@without_autocast
def flex_slot_attention(query: Tensor, key: Tensor, value: Tensor, call: SlotCall) -> tuple[Tensor, Tensor]:
    """Attend; arguments and results as for ``slot_attention``, differentiably on CUDA.

    Raises:
        ValueError: if there is dropout or the blocks are averaged, or the device, the dtype, a width or, on the CPU, a gradient
            cannot be served.
    """
    check_served(query, key, value)
    for what, is_asked in (("dropout", call.words is not None), ("averaged blocks", call.assignment.is_mean)):
        if is_asked:
            raise ValueError(f"backend 'flex' does not serve {what} of content-based patterns; pass backend='gather'")
    batch, heads, tokens = query.shape[:3]
    ratio = heads // key.shape[1]
    key, value = (t.repeat_interleave(ratio, 1).flatten(0, 1) if ratio > 1 else t.flatten(0, 1) for t in (key, value))
    lanes = torch.arange(batch * heads, device=query.device)[:, None]
    parts, flat = [], query.flatten(0, 1)
    run = _compiled() if query.device.type == "cuda" else functools.partial(uncompiled, attend_slots)
    for slots in call.assignment.slots:
        layout = lay_out(slots, call, batch * heads)
        held = flat[lanes, layout.queries.clamp(min=0)], *(t[lanes, layout.keys.clamp(min=0)] for t in (key, value))
        out, lse = run(*(t[None] for t in held), layout, call.scale)
        # one row more of each lane takes what no query asked for
        at = torch.where(layout.queries >= 0, layout.queries, tokens) + lanes * (tokens + 1)
        parts.append((at.flatten(), out[0].flatten(0, 1), lse[0].flatten()))
    at, part, part_lse = (torch.cat(held) for held in zip(*parts, strict=True))
    out, lse = _merged(at, part, part_lse, batch * heads * (tokens + 1))
    out, lse = (t.unflatten(0, (batch, heads, tokens + 1))[:, :, :tokens] for t in (out, lse))
    return out, lse


def lay_out(slots: Slots, call: SlotCall, lanes: int) -> SlotLayout:
    """Lay slots out lane by lane.

    Args:
        slots: blocks of queries and keys, sorted by lane.
        call: what decides inside them.
        lanes: rows times heads.
    """
    device = slots.queries.device
    counts = torch.bincount(slots.lane, minlength=lanes)
    most = max(int(counts.max()), 1)
    width = [-(-held.shape[1] // BLOCK) * BLOCK for held in (slots.queries, slots.keys)]
    nth = torch.arange(len(slots.lane), device=device) - (counts.cumsum(0) - counts)[slots.lane]
    places = []
    for held, size in zip((slots.queries, slots.keys), width, strict=True):
        laid = torch.full((lanes, most, size), -1, dtype=torch.int64, device=device)
        laid[slots.lane, nth, : held.shape[1]] = held
        places.append(laid.flatten(1))
    allowed = torch.zeros(lanes, most, *width, dtype=torch.bool, device=device)
    for lane in range(lanes):
        for at, pairs in call.allowed_of(slots, lane):
            allowed[lane, nth[at], : slots.queries.shape[1], : slots.keys.shape[1]] = pairs
    is_held = torch.arange(most, device=device) < counts[:, None]
    tables = []
    for own, other in (width, width[::-1]):
        own, other = own // BLOCK, other // BLOCK
        tables.append((is_held.repeat_interleave(own, 1) * other).int()[None])
        first = torch.arange(most, device=device).repeat_interleave(own)[:, None] * other
        index = first + torch.arange(other, device=device)
        tables.append(index.int().expand(1, lanes, -1, -1).contiguous())
    return SlotLayout(places[0], places[1], allowed, *tables)


def attend_slots(query: Tensor, key: Tensor, value: Tensor, layout: SlotLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Attend inside slots that are laid out, ``[1, L, X * T, D]`` against ``[1, L, X * S, D]``; what is compiled."""
    size, width = layout.allowed.shape[2:]

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q // size == k // width) & layout.allowed[h, q // size, q % size, k % width]

    block_mask = BlockMask.from_kv_blocks(
        layout.counts,
        layout.indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=allows,
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,
    )
    block_mask.q_num_blocks, block_mask.q_indices = layout.back_counts, layout.back_indices
    out, aux = flex_attention(query, key, value, block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=True))
    return out, aux.lse  # type: ignore[return-value]


def _merged(at: Tensor, part: Tensor, part_lse: Tensor, places: int) -> tuple[Tensor, Tensor]:
    """Merge outputs ``[Y, Dv]`` and logsumexps ``[Y]`` at places ``[Y]``, differentiably."""
    part, part_lse = (t if t.dtype == torch.float64 else t.float() for t in (part, part_lse))
    top = part_lse.new_full((places,), float("-inf")).scatter_reduce(0, at, part_lse.detach(), "amax")
    is_empty = top == float("-inf")
    weight = (part_lse - top.masked_fill(is_empty, 0.0)[at]).exp()
    total = weight.new_zeros(places).index_add(0, at, weight)
    held = total.masked_fill(is_empty, 1.0)
    out = part.new_zeros(places, part.shape[1]).index_add(0, at, weight[:, None] * part) / held[:, None]
    return out, (top.masked_fill(is_empty, 0.0) + held.log()).masked_fill(is_empty, float("-inf"))


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(attend_slots, dynamic=True, fullgraph=True)
