"""The ``flex`` backend: one fused kernel of torch's FlexAttention, for CUDA. On the CPU it runs uncompiled, for checking.

The kernel's mask function reads all that a pattern is made of from tensors, so that lengths, batches, padding, documents
and global tokens of every layer share one compiled function. Half precision is computed as the kernel does it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from hf_sparse.backends.dropout import draw_words, mix, threshold
from hf_sparse.backends.flex_blocks import BLOCK, cached_layout, positional_layout
from hf_sparse.backends.flex_runs import NARROWEST, check_served, uncompiled
from hf_sparse.backends.flex_tags import Layout, Tags
from hf_sparse.backends.kernels import without_autocast
from hf_sparse.parts import Scope
from hf_sparse.patterns import pattern_from_json
from hf_sparse.segments import Segment, find_segments


class Dropped(NamedTuple):
    """What decides whether dropout keeps a pair; see ``backends/dropout.py``.

    Attributes:
        query: int32 ``[B, H, T]``, random words.
        key: int32 ``[S]``, random words.
        limit: int32 ``[H]``, below which a mixed word keeps its pair.
    """

    query: Tensor
    key: Tensor
    limit: Tensor


@torch.compiler.disable
@without_autocast
def flex_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    seed: Tensor | None,
    *,
    pattern: str,
    layer: int,
    is_causal: bool,
    scale: float,
    dropout: float,
    head_offset: int,
    num_heads: int,
    rows: str,
) -> tuple[Tensor, Tensor]:
    """Run a pattern; arguments and results as for ``gather_attention``, differentiably on CUDA.

    A compiled model breaks its graph here: the tables of blocks are made by plain Python, the kernel by a graph of its own.

    Raises:
        ValueError: if the device, the dtype, a width or, on the CPU, a gradient cannot be served.
    """
    check_served(query, key, value)
    rule = pattern_from_json(pattern)
    batch, heads, tokens = query.shape[:3]
    keys = key.shape[2]
    layer = layer if rule.varies_by_layer else 0
    scope = Scope(keys, heads, layer, is_causal, head_offset, num_heads)
    if query_positions is not None and key_positions is not None:
        real = torch.ones(batch, keys, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
        positions = query_positions, key_positions
        layout = positional_layout(rule, scope, *positions, real, global_mask, rows)
    else:
        masks = (key_padding_mask, document_ids, global_mask)
        segments, distinct = _segments(batch, keys, *masks, reads_padding=rule.reads_padding)
        layout = cached_layout(rule, scope, segments, distinct, batch, rows, query.device)
    run = run_compiled if query.device.type == "cuda" else run_plainly
    settings = layout, is_causal, scale
    if seed is None or not dropout:
        return run(query, key, value, *settings)
    words = draw_words(seed, batch, heads, tokens, keys, query.device)
    limit = torch.full((heads,), threshold(dropout), dtype=torch.int32, device=query.device)
    out, kept = run(query, key, value, *settings, Dropped(words[0], words[1], limit))
    # a softmax over the kept pairs alone, times the share of the whole softmax that they have; of the whole one only its
    # logsumexp is wanted, so the narrowest values do
    _, lse = run(query, key, value[..., :NARROWEST].detach(), *settings)
    share = (kept - lse.masked_fill(lse == float("-inf"), 0.0)).exp() / (1 - dropout)
    return (out * share[..., None]).to(query.dtype), lse


def _segments(
    batch: int,
    tokens: int,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    global_mask: Tensor | None,
    *,
    reads_padding: bool,
) -> tuple[tuple[Segment, ...], int]:
    """Return the segments of a batch and its rows, or those of row 0 and 1 where all rows are alike."""
    if key_padding_mask is None and document_ids is None and global_mask is None:
        return (Segment(0, 0, tokens),), 1
    found = find_segments(
        batch,
        tokens,
        key_padding_mask=key_padding_mask,
        document_ids=document_ids,
        global_mask=global_mask,
        reads_padding=reads_padding,
    )
    by_row: list[list[Segment]] = [[] for _ in range(batch)]
    for segment in found:
        by_row[segment.row].append(segment)
    first = by_row[0]
    for held in by_row:
        if len(held) != len(first) or not all(s.is_like(t, s.row) for s, t in zip(held, first, strict=True)):
            return tuple(found), batch
    return tuple(first), 1


@functools.cache
def compiled_attention(backend: str | Callable[..., Any] = "inductor") -> Callable[..., tuple[Tensor, Tensor]]:
    """Return ``attend``, compiled for all lengths; equal calls get the same function."""
    return torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)


def run_compiled(*arguments: Any, backend: str | Callable[..., Any] = "inductor") -> tuple[Tensor, Tensor]:
    """Run ``attend`` compiled.

    One graph serves all lengths, batches, padding, documents and global tokens. Others are for what torch takes for a
    constant (a batch of one, a single block, a single query), for another dtype, width or number of heads, with dropout,
    without gradients, and for a pattern of other numbers of bands and tables.

    Args:
        arguments: of ``attend``.
        backend: the compiler; tests count with one of their own.
    """
    # the scale is a constant of the kernel; sizes that happen to be equal at one length are not taken to be equal always
    settings = torch._dynamo.config.patch(specialize_float=True, recompile_limit=64)
    with settings, torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return compiled_attention(backend)(*arguments)


def run_plainly(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Run ``attend`` uncompiled, without gradients: scores of T x S, for checking."""
    return uncompiled(attend, *arguments)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    is_causal: bool,
    scale: float,
    dropped: Dropped | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend along the edges of a layout; what is compiled.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        layout: who reads whom, with B rows.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        dropped: what decides about dropout; None without.

    Returns:
        Output ``[B, H, T, Dv]`` and logsumexp ``[B, H, T]``, over the kept pairs.
    """
    counts, indices, full_counts, full_indices, *by_key = layout.blocks
    block_mask = BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_edges(layout.tags, is_causal),
        seq_lengths=(query.shape[2], key.shape[2]),
        compute_q_blocks=False,  # torch would go through a table of all blocks against all
    )
    block_mask.q_num_blocks, block_mask.q_indices, block_mask.full_q_num_blocks, block_mask.full_q_indices = by_key
    out, aux = flex_attention(
        query,
        key,
        value,
        score_mod=None if dropped is None else _dropping(dropped),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse  # type: ignore[return-value]


def _dropping(dropped: Dropped) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the score function of dropout: the score of a kept pair, -inf for a dropped one."""

    def keep(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_kept = mix(dropped.query[b, h, q], dropped.key[k]) < dropped.limit[h]
        return torch.where(is_kept, score, float("-inf"))

    return keep


def _edges(tags: Tags, is_causal: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the mask function of tags: sample, head, query and key to whether the query reads the key."""

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        i, j = tags.q_position[b, q], tags.k_position[b, k]
        edge = i < i
        for band in tags.bands:
            size, step = band.size[h], band.step[h]
            x, y = i // size, j // size
            edge = edge | ((x - y <= band.before[h]) & (y - x <= band.after[h]) & (x % step == y % step))
        for table in tags.tables:
            row, block = table.q_row[b, q], j // table.size[h]
            for column in table.columns:
                edge = edge | (column[h, row] == block)
        if tags.q_global is not None and tags.k_global is not None:
            edge = edge | tags.q_global[b, h, q] | tags.k_global[b, h, k]
        if is_causal:
            edge = edge & (j <= i)
        return edge & (tags.q_segment[b, h, q] == tags.k_segment[b, k])

    return allows
