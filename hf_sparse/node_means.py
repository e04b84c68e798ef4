"""Nodes as means of tokens: those that start so, and those that each layer makes anew."""

import torch
from torch import Tensor

from hf_sparse.patterns import Pattern, pattern_from_json
from hf_sparse.segments import find_segments


@torch.library.custom_op("hf_sparse::node_places", mutates_args=())
def node_places(
    is_real: Tensor,
    document_ids: Tensor | None,
    segment_ids: Tensor | None,
    pattern: str,
    has_holes: bool,
) -> Tensor:
    """Say which tokens each node of a batch is the mean of.

    Args:
        is_real: bool ``[B, T]``, True = a real token.
        document_ids: int ``[B, T]``, as for ``sparse_attention``.
        segment_ids: int ``[B, T]``, for patterns that take them.
        pattern: JSON of a pattern with nodes.
        has_holes: whether there may be padding between real tokens.

    Returns:
        int64 ``[B, nodes, 2]``, first and behind the last token; both 0 for nodes that a row with fewer tokens does not have.

    Raises:
        ValueError: if there are holes where there may be none.
    """
    rule = pattern_from_json(pattern)
    batch, tokens = is_real.shape
    places = torch.zeros(batch, rule.num_nodes(tokens), 2, dtype=torch.int64)
    for segment in find_segments(
        batch,
        tokens,
        key_padding_mask=is_real,
        document_ids=document_ids,
        segment_ids=segment_ids,
        most_nodes=rule.num_nodes(tokens),
    ):
        if segment.invalid and not has_holes:
            raise ValueError(f"pattern {rule.key!r} does not serve padding between real tokens")
        if segment.spans is None:
            spans = rule.node_spans(segment.length)
        else:
            spans = torch.tensor(segment.spans, dtype=torch.int64).view(-1, 2)
        places[segment.row, segment.first_node :][: len(spans)] = spans + segment.start
    return places.to(is_real.device)


@node_places.register_fake
def _(is_real, _document_ids, _segment_ids, pattern, _has_holes):  # type: ignore[no-untyped-def]
    nodes = pattern_from_json(pattern).num_nodes(is_real.shape[1])
    return is_real.new_empty(is_real.shape[0], nodes, 2, dtype=torch.int64)


def span_means(tokens: Tensor, places: Tensor, counts: Tensor) -> Tensor:
    """Return means of tokens.

    Args:
        tokens: float ``[B, T, D]``, 0 where there is no real token.
        places: int64 ``[B, nodes, 2]``, first and behind the last token of each.
        counts: ``[B, nodes]``, the real tokens among them.

    Returns:
        float ``[B, nodes, D]``, 0 where there are none.
    """
    # sums of long texts lose little in double precision
    sums = torch.nn.functional.pad(tokens.double().cumsum(1), (0, 0, 1, 0))
    first, last = (places[..., end, None].expand(-1, -1, tokens.shape[2]) for end in range(2))
    found = (sums.gather(1, last) - sums.gather(1, first)) / counts.clamp(min=1)[..., None]
    return found.to(tokens.dtype)


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
        ``[B, G, T + nodes, Dv]``; in float32 where half precision is given, which would round the logarithms.

    Raises:
        ValueError: if there is padding between real tokens, or the scale is 0.
    """
    if not scale:
        raise ValueError(
            f"pattern {pattern.key!r} pools spans, whose sizes count in the scores, so scale must not be 0"
        )
    query, key, value = (t if t.dtype == torch.float64 else t.float() for t in (query, key, value))
    batch, groups, tokens, width = key.shape
    if key_padding_mask is None:
        key_padding_mask = torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
    places = node_places(key_padding_mask, None, None, pattern.json, False)
    counts = places[..., 1] - places[..., 0]
    held = torch.cat([key, value], 3).transpose(1, 2).flatten(2)
    held = held.masked_fill(~key_padding_mask[..., None], 0.0)
    means = span_means(held, places, counts).unflatten(2, (groups, -1)).transpose(1, 2)
    keys = torch.cat([key, means[..., :width]], 2)
    weights = torch.nn.functional.pad(counts.clamp(min=1).double().log() / scale, (tokens, 0)).to(key.dtype)
    keys = torch.cat([keys, weights[:, None, :, None].expand(-1, groups, -1, -1)], 3)
    query = torch.nn.functional.pad(torch.nn.functional.pad(query, (0, 1), value=1.0), (0, 0, 0, counts.shape[1]))
    return query, keys, torch.cat([value, means[..., width:]], 2)
