"""The ``dense`` backend: a mask of N x N and one softmax. The reference that ships; for short sequences."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.backends.dropout import mix, threshold
from hf_sparse.backends.kernels import without_autocast
from hf_sparse.parts import Scope, edge_mask, with_global_positions
from hf_sparse.patterns import Pattern, pattern_from_json
from hf_sparse.segments import Segment, find_segments, logical_length, places
from hf_sparse.tiles import Mask


@torch.library.custom_op("hf_sparse::edge_mask", mutates_args=())
def draw_edges(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
    head_offset: int,
    num_heads: int,
    rows: str,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """Draw the edges of a batch; arguments as for ``hf_sparse::gather``.

    Returns:
        bool ``[B, H, T, S]``; True where the query reads the key.
    """
    batch, heads, tokens = query.shape[:3]
    keys = key.shape[2]
    rule = pattern_from_json(pattern)
    mask = torch.zeros(batch, heads, tokens, keys, dtype=torch.bool)

    def draw(scope: Scope, held: tuple[int, ...] | None, q: Tensor, k: Tensor) -> Tensor:
        parts = with_global_positions(rule.parts(scope), held)
        nodes_at = scope.length if scope.nodes else None
        return edge_mask(parts, q[:, None], k[None, :], heads=heads, is_causal=is_causal, rows=rows, tokens=nodes_at)

    if query_positions is not None and key_positions is not None:
        for row in range(batch):
            q, k = query_positions[row].cpu(), key_positions[row].cpu()
            held = None if global_mask is None else tuple(k[global_mask[row].cpu()].tolist())
            real = torch.ones(keys, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[row].cpu()
            length = logical_length(k, real, reads_padding=rule.reads_padding)
            scope = Scope(length, heads, layer, is_causal, head_offset, num_heads)
            mask[row] = draw(scope, held, q, k) & real
        return mask.to(query.device)
    for segment, scope, at in _sequences(
        rule, layer, is_causal, batch, keys, key_padding_mask, global_mask, document_ids, segment_ids
    ):
        position = torch.arange(len(at))
        whole = dataclasses.replace(scope, heads=heads, head_offset=head_offset, num_heads=num_heads)
        drawn = draw(whole, segment.global_positions, position, position)
        drawn[:, :, list(segment.invalid)] = False
        drawn[:, list(segment.invalid)] = False
        mask[segment.row, :, at[:, None], at] = drawn
    return mask.to(query.device)


@draw_edges.register_fake
def _(query, key, *_args):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.bool)


@torch.library.custom_op("hf_sparse::labels", mutates_args=())
def draw_labels(
    key: Tensor,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    segment_ids: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
) -> Tensor:
    """Draw the labels of a pattern that has some, for queries that are the keys; arguments as for ``hf_sparse::gather``.

    Returns:
        int64 ``[B, T, T]``, 0 between sequences.
    """
    rule = pattern_from_json(pattern)
    batch, total = key.shape[0], key.shape[2]
    names = torch.zeros(batch, total, total, dtype=torch.int64)
    for segment, scope, at in _sequences(
        rule, layer, is_causal, batch, total, key_padding_mask, None, document_ids, segment_ids
    ):
        position = torch.arange(len(at))
        names[segment.row, at[:, None], at] = rule.label(position[:, None], position[None, :], scope)
    return names.to(key.device)


@draw_labels.register_fake
def _(key, *_args):  # type: ignore[no-untyped-def]
    return key.new_empty(key.shape[0], key.shape[2], key.shape[2], dtype=torch.int64)


def _sequences(
    rule: Pattern,
    layer: int,
    is_causal: bool,
    batch: int,
    total: int,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    segment_ids: Tensor | None,
) -> Iterator[tuple[Segment, Scope, Tensor]]:
    """Yield the sequences of a batch, their scope for one head, and where their tokens and nodes stand in the row."""
    tokens = rule.num_tokens(total)
    for segment in find_segments(
        batch,
        tokens,
        key_padding_mask=key_padding_mask,
        document_ids=document_ids,
        global_mask=global_mask,
        reads_padding=rule.reads_padding,
        segment_ids=segment_ids,
        most_nodes=rule.num_nodes(tokens),
    ):
        nodes = rule.nodes_of(segment.length, segment.spans)
        scope = Scope(segment.length, 1, layer, is_causal, nodes=nodes, spans=segment.spans)
        yield segment, scope, torch.arange(total)[places(segment, tokens, nodes)]


@without_autocast
def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    words: tuple[Tensor, Tensor] | None,
    *,
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend under a mask; half precision is computed in float32.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        mask: bool, broadcastable to ``[B, H, T, S]``; True where the query reads the key.
        words: of the dropout, int32 ``[B, H, T]`` and ``[S]``; None without dropout.
        scale: factor of the scores.
        dropout: probability of dropping an attention probability.
        bias: float, broadcastable to ``[B, H, T, S]``, added to the scaled (and capped) scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        Output ``[B, H, T, Dv]`` in the dtype of the query, and logsumexp ``[B, H, T]``.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    ratio = query.shape[1] // key.shape[1]
    k, v = (t.to(exact).repeat_interleave(ratio, 1) if ratio > 1 else t.to(exact) for t in (key, value))
    scores = (query.to(exact) * scale) @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf"))
    # a query that reads nothing: its row of -inf is set to 0 before, and its output to 0 after
    is_empty = (scores == float("-inf")).all(-1, keepdim=True)
    lse = scores.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True)
    probabilities = (scores - lse).exp().masked_fill(is_empty, 0.0)
    if words is not None:
        is_kept = mix(words[0][..., None], words[1]) < threshold(dropout)
        probabilities = probabilities * is_kept / (1 - dropout)
    out = probabilities @ v
    return out.to(query.dtype), lse.masked_fill(is_empty, float("-inf"))[..., 0]


def takes_mask(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Say whether torch's fused CPU kernel takes them with a mask, and computes in float32 or better as we do.

    Tensors that only stand for others, as in tracing, are left to the operator of ``gather``, which knows them.
    """
    if query.device.type != "cpu" or query.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
        return False
    is_plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (query, key, value))
    return is_plain and query.shape == key.shape == value.shape and query.dtype == value.dtype


@without_autocast
def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, *, is_causal: bool, scale: float, dropout: float
) -> Tensor:
    """Return torch's own dense attention, in the dtype given, under a pattern's whole mask or where it allows every pair.

    Args:
        query: float ``[B, H, N, D]``.
        key: float ``[B, G, N, D]``; with a mask H is G.
        value: float ``[B, G, N, Dv]``.
        mask: of ``[N, N]``, with causality in it; None where every pair is an edge that causality leaves.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        dropout: probability of dropping an attention probability.
    """
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask.additive(query)[None, None],
        dropout_p=dropout,
        is_causal=is_causal and mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
