"""One attention call: from a pattern to an output."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.backends.dense import dense_attention, draw_edges, draw_labels, takes_mask, torch_attention
from hf_sparse.backends.dropout import draw_words
from hf_sparse.backends.gather import gather_attention
from hf_sparse.choice import BACKENDS, choose_backend, cuda_backend
from hf_sparse.content import ContentCall, content_attention
from hf_sparse.counted_keys import with_counted_keys
from hf_sparse.global_rows import FewRows, can_fold, checked_hidden_states, names_global_tokens, put_rows, with_unused
from hf_sparse.node_means import with_pooled_nodes
from hf_sparse.parts import Scope
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.labels import RelativeLabels
from hf_sparse.patterns.projections import GlobalProjections, RelayProjections
from hf_sparse.score_terms import ScoreTerms
from hf_sparse.shapes import check_attention_inputs, check_token_mask


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    global_mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    layer: int = 0,
    state: nn.Module | None = None,
    hidden_states: Tensor | None = None,
    document_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    bias: Tensor | None = None,
    distance_bias: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    head_offset: int = 0,
    num_heads: int | None = None,
    training: bool = False,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend along the edges of a pattern, differentiably.

    A query that may read nothing, a padding token among them, gets output 0 and logsumexp -inf. Positions are counted in
    each row (and document) from its first real token, so padding on the left moves nothing. Of a pattern with nodes that are no
    tokens, the nodes stand behind the tokens of query, key and value (``pattern.num_nodes(tokens)`` of them) and count in T
    and S; a shorter sequence of a padded batch uses the first ones of its row. What a mask says of nodes is not read.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``; ``H`` is a multiple of ``G``.
        value: float ``[B, G, S, Dv]``.
        pattern: who reads whom.
        is_causal: whether keys ahead of the query are left out.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        global_mask: bool ``[B, S]``, True = a global token; replaces the pattern's own positions.
        scale: factor of the scores; ``D ** -0.5`` if None.
        dropout: probability of dropping an attention probability, from 0 up to but not including 1.
        layer: index of the layer, at least 0.
        state: the module that ``pattern.make_state`` made; without it Longformer's global rows use ``query``, ``key`` and
            ``value`` as well.
        hidden_states: float ``[B, S, hidden_size]``, what the attention layer was given; needed with ``state``.
        document_ids: int ``[B, S]``; tokens of equal id are one packed document and read nothing of the others; below 0
            is padding.
        segment_ids: int ``[B, S]``, for patterns whose nodes stand for segments given with the call (``segments="given"``):
            neighbours of equal id are a segment and have a node, below 0 is none; a row uses its first nodes, in order.
        query_positions: int64 ``[B, T]``, logical; needed where queries are not the last ``T`` of the keys.
        key_positions: int64 ``[B, S]``, logical, where the keys are a kept subset.
        bias: float, broadcastable to ``[B, H, T, S]``, added to the scores. Backend "dense" alone serves it.
        distance_bias: float ``[H, 2 * M + 1]``, added to the scores by how far the key stands from the query (key less query),
            for distances from -M to M; what is farther counts as M away. Backends "gather" and "dense" serve it.
        softcap: caps the scores by ``softcap * tanh(scores / softcap)``. Backends "gather" and "dense" serve it.
        sinks: float ``[H]``, a score of each head that gives nothing. Backends "gather" and "dense" serve it.
        head_offset: index of the first head held here, for tensor or sequence parallel ranks.
        num_heads: heads of the whole layer, where others hold some; BigBird's published draw depends on it.
        training: whether this is training, where a content-based pattern adds its noise and its state follows the tokens.
        backend: "gather" (blocks, any device), "dense" (a mask of T x S), "flex" (one fused kernel, CUDA; forward alone on
            the CPU), "varlen" (a plain window, CUDA, half precision) or "auto" (what serves the call best; see ``explain``).
        return_lse: whether to return the logsumexp as well.

    Returns:
        Output ``[B, H, T, Dv]``; with ``return_lse`` also the logsumexp ``[B, H, T]``, float32 (float64 for float64).

    Raises:
        ValueError: if shapes do not fit, the backend is unknown or cannot serve the call, or a mask means nothing to
            the pattern.
        TypeError: if a dtype is wrong or ``pattern`` is no pattern.
    """
    num_heads = _checked_heads(query, key, value, pattern, dropout, layer, head_offset, num_heads)
    _check_masks(key, pattern, key_padding_mask, global_mask, document_ids, segment_ids)
    if key_padding_mask is not None and _is_all_real(key_padding_mask):
        key_padding_mask = None
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    tokens, dtype = query.shape[2], query.dtype
    terms = ScoreTerms(bias, distance_bias, softcap, sinks)
    terms.check(query, key.shape[2], pattern)
    if pattern.has_nodes:
        _check_nodes(pattern, query, key, document_ids, query_positions, state)
    if pattern.pools_nodes:
        query, key, value = with_pooled_nodes(
            query, key, value, pattern, key_padding_mask=key_padding_mask, scale=scale
        )
        key_padding_mask, global_mask = (
            None if mask is None else nn.functional.pad(mask, (0, key.shape[2] - tokens))
            for mask in (key_padding_mask, global_mask)
        )
    counts = pattern.added_scores(1) is not None
    if counts:
        refused = {
            "causal attention": is_causal,
            "document_ids": document_ids is not None,
            "cached decoding": query_positions is not None or tokens != key.shape[2],
            "softcap": softcap is not None,
        }
        query, key = with_counted_keys(query, key, pattern, scale=scale, refused=refused)
    others = (key_padding_mask, global_mask, document_ids, query_positions, key_positions, state)
    if return_lse and not pattern.has_lse:
        raise ValueError(f"pattern {pattern.key!r} averages blocks, so they have no common logsumexp")
    if pattern.is_content_based:
        _check_content(pattern, backend, terms, query, key, query_positions, key_positions)
        call = ContentCall(
            key_padding_mask=key_padding_mask,
            global_mask=global_mask,
            document_ids=document_ids,
            hidden_states=hidden_states,
            state=state,
            seed=_seed(dropout),
            is_causal=is_causal,
            scale=scale,
            dropout=dropout,
            layer=layer,
            head_offset=head_offset,
            num_heads=num_heads,
            backend=backend,
            is_training=training,
        )
        out, lse = content_attention(query, key, value, pattern, call)
        return (out, lse) if return_lse else out
    own_layer = layer if pattern.varies_by_layer else 0
    scope = Scope(key.shape[2], query.shape[1], own_layer, is_causal, head_offset, num_heads)
    choice = choose_backend(
        backend,
        pattern,
        scope,
        query.device.type,
        can_flex=query.dtype != torch.float64 and min(query.shape[3], value.shape[3]) >= 16,
        can_mask=takes_mask(query, key, value),
        terms=terms.names,
        is_plain=not (return_lse or counts)
        and query.shape[2] == key.shape[2]
        and all(other is None for other in others),
        dropout=dropout,
    )
    if choice.backend == "sdpa":
        return torch_attention(query, key, value, choice.mask, is_causal=is_causal, scale=scale, dropout=dropout)
    held = None if pattern.reads_padding else key_padding_mask
    positions = _positions(query, key, held, document_ids, query_positions, key_positions)
    masks = (key_padding_mask, global_mask, document_ids, *positions)
    settings: dict[str, Any] = {
        "pattern": pattern.json,
        "layer": layer,
        "is_causal": is_causal,
        "head_offset": head_offset,
        "num_heads": num_heads,
    }
    label_scores = None
    if isinstance(state, RelativeLabels):
        label_scores, state = state(query, scale=scale, head_offset=head_offset), None
        if label_scores.shape[3] != pattern.num_labels:
            raise ValueError(
                f"the state has {label_scores.shape[3]} labels, but pattern {pattern.key!r} has {pattern.num_labels}; make it "
                "with pattern.make_state"
            )

    def run(q: Tensor, k: Tensor, v: Tensor, rows: str) -> tuple[Tensor, Tensor]:
        seed = _seed(dropout)
        if choice.backend == "dense":
            drawn = draw_edges(q, k, *masks, **settings, rows=rows, segment_ids=segment_ids)
            added = terms.drawn_bias(q, k, *positions)
            if label_scores is not None:
                names = draw_labels(k, key_padding_mask, document_ids, segment_ids, pattern.json, layer, is_causal)
                term = label_scores.gather(3, names[:, None].expand(-1, q.shape[1], -1, -1))
                added = term if added is None else added + term
            words = None if seed is None else draw_words(seed, *q.shape[:3], k.shape[2], q.device)
            return dense_attention(q, k, v, drawn, words, scale=scale, dropout=dropout, bias=added, softcap=softcap)
        given = {**settings, "scale": scale, "dropout": dropout, "rows": rows}
        if choice.backend == "gather":
            given["may_be_whole"] = backend == "auto" and label_scores is None and terms.is_plain
            given |= {"softcap": softcap or 0.0, "segment_ids": segment_ids}
            scores = label_scores if distance_bias is None else distance_bias
            return gather_attention(q, k, v, *masks, seed, **given, label_scores=scores)
        return cuda_backend(choice.backend)(q, k, v, *masks, seed, **given)

    if state is None:
        out, lse = terms.with_sinks(*run(query, key, value, "all"))
        if pattern.pools_nodes or counts:
            out, lse = out[:, :, :tokens].to(dtype), lse[:, :, :tokens]
        return (out, lse) if return_lse else out
    hidden_states = checked_hidden_states(hidden_states, query, key, pattern)
    out, lse = run(query, key, value, "shared")
    if global_mask is None and not names_global_tokens(pattern, with_projections=True):
        out = with_unused(out, state)
    else:
        rows = None
        has_positions = query_positions is not None or key_positions is not None
        may_fold = backend == "auto" and terms.is_plain and not has_positions and not torch.compiler.is_compiling()
        if may_fold and can_fold(state):
            rows = FewRows(pattern, scope, state, hidden_states, masks[:3])
        if rows is not None and rows.is_worth_it:
            out, lse = rows.put(out, lse, _seed(dropout), scale=scale, dropout=dropout)
        else:
            projections: Any = state
            q, k, v = projections(hidden_states)
            row_out, row_lse = run(q, k, v, "own")
            out, lse = put_rows(out, lse, projections.finish(row_out), row_lse)
    out, lse = terms.with_sinks(out, lse)
    return (out, lse) if return_lse else out


def _check_content(
    pattern: Pattern,
    backend: str,
    terms: ScoreTerms,
    query: Tensor,
    key: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> None:
    """Refuse what content-based patterns cannot serve."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    refused = {f"backend {backend!r}; pass 'gather'": backend not in ("auto", "gather", "dense", "flex")}
    refused |= dict.fromkeys(terms.names, True)
    refused["cached decoding, since it looks at all queries of a sequence; pass use_cache=False"] = (
        query.shape[2] != key.shape[2] or query_positions is not None or key_positions is not None
    )
    for what, is_given in refused.items():
        if is_given:
            raise ValueError(f"pattern {pattern.key!r} is content-based and does not serve {what}")


def _check_nodes(
    pattern: Pattern,
    query: Tensor,
    key: Tensor,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    state: nn.Module | None,
) -> None:
    """Refuse what a pattern with nodes behind the tokens cannot serve."""
    refused = {
        "document_ids: the documents of a row would share its nodes": document_ids is not None
        and not pattern.takes_segments,
        "cached decoding": query_positions is not None or query.shape[2] != key.shape[2],
        "global projections; set global_projections=False": isinstance(state, GlobalProjections)
        and not isinstance(state, RelayProjections),
    }
    for what, is_given in refused.items():
        if is_given:
            raise ValueError(f"pattern {pattern.key!r} has nodes that are no tokens and does not serve {what}")


def _seed(dropout: float) -> Tensor | None:
    """Draw a seed on the CPU from the global generator, so that checkpointing repeats it."""
    return torch.randint(0, 2**62, (1,), device="cpu") if dropout else None


def _is_all_real(mask: Tensor) -> bool:
    """Say whether a mask may be left away; looked at only where looking neither waits for a device nor breaks a graph."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def _checked_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    dropout: float,
    layer: int,
    head_offset: int,
    num_heads: int | None,
) -> int:
    """Check what is no mask, and return the heads of the whole layer."""
    check_attention_inputs(query, key, value)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as hf_sparse.pattern('band'), got {pattern!r}")
    least_heads = head_offset + query.shape[1]
    num_heads = least_heads if num_heads is None else num_heads
    for name, number, least in (
        ("layer", layer, 0),
        ("head_offset", head_offset, 0),
        ("num_heads", num_heads, least_heads),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return num_heads


def _check_masks(
    key: Tensor,
    pattern: Pattern,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    batch, tokens = key.shape[0], key.shape[2]
    for name, mask in (("key_padding_mask", key_padding_mask), ("global_mask", global_mask)):
        if mask is not None:
            check_token_mask(mask, name, batch=batch, tokens=tokens)
    for name, ids in (("document_ids", document_ids), ("segment_ids", segment_ids)):
        if ids is not None:
            check_token_mask(ids, name, batch=batch, tokens=tokens, is_boolean=False)
    check_segments_are_known(pattern, segment_ids)
    check_global_mask_means_something(pattern, global_mask)


def check_segments_are_known(pattern: Pattern, segment_ids: Tensor | None) -> None:
    """Refuse segment ids where they mean nothing, and their absence where they are needed.

    Raises:
        ValueError: in both cases.
    """
    if pattern.takes_segments and segment_ids is None:
        raise ValueError(
            f"pattern {pattern.key!r} with segments='given' needs segment_ids [batch, tokens] with each call; for sentences, "
            "hf_sparse.sentence_ids(input_ids, tokenizer) makes them"
        )
    if segment_ids is not None and not pattern.takes_segments:
        raise ValueError(
            f"segment_ids were given, but the nodes of pattern {pattern.key!r} stand for no segments given with the call; "
            "hf_sparse.pattern('etc', segments='given') has such nodes"
        )


def check_global_mask_means_something(pattern: Pattern, global_mask: Tensor | None) -> None:
    """Refuse a global mask for a pattern that has no global tokens.

    Raises:
        ValueError: if there is a mask and the pattern would ignore it.
    """
    if global_mask is not None and not pattern.has_global_tokens:
        raise ValueError(
            f"a global mask was given, but pattern {pattern.key!r} has no global tokens; "
            f"use a union such as pattern | hf_sparse.pattern('global')"
        )


def _positions(
    query: Tensor,
    key: Tensor,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return logical positions of queries and keys where the queries are not the keys, else two Nones."""
    batch, tokens, keys = query.shape[0], query.shape[2], key.shape[2]
    if tokens == keys and query_positions is None and key_positions is None:
        return None, None
    if document_ids is not None:
        raise ValueError("document_ids cannot be used where the queries are not the keys")
    if query_positions is None and tokens > keys:
        raise ValueError(f"{tokens} queries over {keys} keys need query_positions")
    for name, positions, count in (
        ("query_positions", query_positions, tokens),
        ("key_positions", key_positions, keys),
    ):
        if positions is not None:
            check_token_mask(positions, name, batch=batch, tokens=count, is_boolean=False)
    index = torch.arange(keys, device=key.device).expand(batch, -1)
    first = torch.zeros(batch, 1, dtype=torch.int64, device=key.device)
    if key_padding_mask is not None:
        first = key_padding_mask.int().argmax(1, keepdim=True)
    if key_positions is None:
        key_positions = index - first
    if query_positions is None:
        query_positions = key_positions[:, keys - tokens :]
    return query_positions, key_positions
