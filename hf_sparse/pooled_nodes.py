"""Nodes that each layer makes anew: the mean of the keys and values of some tokens, read as if they were that many tokens."""

import torch
from torch import Tensor

from hf_sparse.patterns import Pattern
from hf_sparse.segments import find_segments


def with_pooled_nodes(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, *, key_padding_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Put nodes behind the tokens.

    A node's key and value are means. The logarithm of the number of tokens is added to its score, by one more column of
    queries and keys: then n tokens that are all alike weigh as much through their node as they do one by one.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, T, D]``.
        value: float ``[B, G, T, Dv]``.
        pattern: says what the nodes are.
        key_padding_mask: bool ``[B, T]``, True = a real token.
        scale: factor of the scores; not 0.

    Returns:
        query ``[B, H, T + nodes, D + 1]``, in which nodes are 0; key ``[B, G, T + nodes, D + 1]`` and value
        ``[B, G, T + nodes, Dv]``.

    Raises:
        ValueError: if there is padding between real tokens.
    """
    batch, tokens = key.shape[0], key.shape[2]
    nodes = pattern.num_nodes(tokens)
    rows = []
    if key_padding_mask is None:
        rows.append(_pool(key, value, pattern, 0, tokens, nodes, scale))
    else:
        segments = {s.row: s for s in find_segments(batch, tokens, key_padding_mask=key_padding_mask)}
        if any(segment.invalid for segment in segments.values()):
            raise ValueError(f"pattern {pattern.key!r} does not serve padding between real tokens")
        for row in range(batch):
            start, stop = (segments[row].start, segments[row].stop) if row in segments else (0, 1)
            at = slice(row, row + 1)
            rows.append(_pool(key[at], value[at], pattern, start, stop - start, nodes, scale))
    keys, values = (torch.cat(parts) for parts in zip(*rows, strict=True))
    query = torch.nn.functional.pad(query, (0, 1), value=1.0)
    return torch.nn.functional.pad(query, (0, 0, 0, nodes)), keys, values


def _pool(
    key: Tensor, value: Tensor, pattern: Pattern, start: int, length: int, nodes: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the keys, one column wider, and values of some rows with the nodes of ``length`` tokens behind them."""
    spans = pattern.node_spans(length).to(key.device)
    sizes = (spans[:, 1] - spans[:, 0]).to(key.dtype)
    behind = nodes - len(spans)
    key_means, value_means = (_means(t[:, :, start : start + length], spans, sizes) for t in (key, value))
    weight = torch.nn.functional.pad((sizes.double().log() / scale).to(key.dtype), (0, behind))
    column = torch.cat([weight.new_zeros(key.shape[2]), weight])[None, None, :, None].expand(*key.shape[:2], -1, -1)
    fill = (0, 0, 0, behind)
    keys = torch.cat([key, torch.nn.functional.pad(key_means, fill)], 2)
    values = torch.cat([value, torch.nn.functional.pad(value_means, fill)], 2)
    return torch.cat([keys, column], 3), values


def _means(tokens: Tensor, spans: Tensor, sizes: Tensor) -> Tensor:
    """Return the means ``[B, G, nodes, D]`` of spans of tokens ``[B, G, T, D]``."""
    sums = torch.nn.functional.pad(tokens.double().cumsum(2), (0, 0, 1, 0))
    means = (sums[:, :, spans[:, 1]] - sums[:, :, spans[:, 0]]) / sizes.double()[:, None]
    return means.to(tokens.dtype)
