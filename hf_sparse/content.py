"""Content-based attention: ask the pattern who reads whom, sequence by sequence, and merge what positions add."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.backends.dense import dense_attention, draw_edges
from hf_sparse.backends.dropout import draw_words
from hf_sparse.backends.flex_slots import flex_slot_attention
from hf_sparse.backends.gather import gather_attention
from hf_sparse.backends.slot_attention import slot_attention
from hf_sparse.backends.slot_calls import SlotCall
from hf_sparse.choice import choose_backend, cuda_backend
from hf_sparse.global_rows import with_unused
from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import ByHead, Pattern, Union, parts_of
from hf_sparse.patterns.content import Content, ContentPattern
from hf_sparse.segments import Segment, find_segments


@dataclass(frozen=True, eq=False)
class ContentCall:
    """What a call is given beside query, key and value; as for ``sparse_attention``.

    Attributes:
        key_padding_mask: bool ``[B, N]``.
        global_mask: bool ``[B, N]``.
        document_ids: int ``[B, N]``.
        hidden_states: float ``[B, N, hidden_size]``.
        state: of the content-based member.
        seed: int64 ``[1]``, of the dropout; None without it.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        dropout: probability of dropping an attention probability.
        layer: index of the layer.
        head_offset: index of the first head held here.
        num_heads: heads of the whole layer.
        backend: "gather", "dense" or "flex".
        is_training: whether noise that is for training is added.
    """

    key_padding_mask: Tensor | None
    global_mask: Tensor | None
    document_ids: Tensor | None
    hidden_states: Tensor | None
    state: nn.Module | None
    seed: Tensor | None
    is_causal: bool
    scale: float
    dropout: float
    layer: int
    head_offset: int
    num_heads: int
    backend: str
    is_training: bool


@torch.compiler.disable
def content_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: ContentCall
) -> tuple[Tensor, Tensor]:
    """Attend along a pattern of which a member is content-based, differentiably in all but the choice of edges.

    Args:
        query: float ``[B, H, N, D]``.
        key: float ``[B, G, N, D]``.
        value: float ``[B, G, N, Dv]``.
        pattern: who reads whom.
        call: everything else.

    Returns:
        Output ``[B, H, N, Dv]`` in the dtype of the query, and logsumexp ``[B, H, N]``.

    Raises:
        ValueError: if the members of the pattern do not go together, or the backend cannot serve the call.
    """
    if isinstance(pattern, ByHead):
        return _by_head(query, key, value, pattern, call)
    content, rest = _split(pattern)
    if content is None:
        return _by_position(query, key, value, pattern, call)
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        q, k, scale = content.prepare(query.to(exact), key.to(exact), call.scale)
        call, v = replace(call, scale=scale), value.to(exact)
        if k.shape[1] > v.shape[1]:
            # keys made of queries are no longer shared by heads
            v = v.repeat_interleave(k.shape[1] // v.shape[1], 1)
        words = None
        if call.seed is not None:
            words = draw_words(call.seed, *query.shape[:3], key.shape[2], query.device)
        parts = []
        is_real = torch.zeros(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
        for rows, at, segment, positions in _sequences(
            query, call, query.shape[2] - content.num_tokens(query.shape[2])
        ):
            held = [_of_sequence(tensor, rows, at) for tensor in (q, k, v)]
            drawn = None if words is None else (words[0][rows][:, :, at], words[1][at])
            hidden = None if call.hidden_states is None else call.hidden_states[rows][:, at]
            scope = Scope(len(positions), q.shape[1], call.layer, call.is_causal, call.head_offset, call.num_heads)
            known = Content(
                scope,
                call.state,
                hidden,
                not is_real.any(),
                call.is_training,
                call.scale,
                rows,
                query.shape[0],
                takes_shares=call.backend not in ("dense", "flex"),
            )
            found = _attend(held[0], held[1], held[2], content, rest, segment, positions, known, call, drawn)
            parts.append((rows, at, found))
            is_real[rows, at] = True
        out, lse = _joined(parts, q, v, is_whole=len(parts) == 1 and bool(is_real.all()))
        content.finish(call.state, is_training=call.is_training)
        if rest is not None:
            out, lse = _united((out, lse), _by_position(q, k, v, rest, call))
        if content.self_is_last_resort:
            out, lse = _with_self(out, lse, q, k, v, scale, is_real)
        if call.state is not None:
            out = with_unused(out, call.state)
    return out.to(query.dtype), lse


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    content: ContentPattern,
    rest: Pattern | None,
    segment: Segment,
    positions: Tensor,
    known: Content,
    call: ContentCall,
    words: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Attend by content on rows that hold one sequence each, without padding."""
    heads, tokens, ratio = query.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    own = key.detach().repeat_interleave(ratio, 1) if ratio > 1 else key.detach()
    key, value = content.extend(query, key, value, known)
    with torch.no_grad():
        assignment = content.choose(query.detach(), own, known)
    parts: tuple[Any, ...] = ()
    if rest is not None:
        if assignment.is_mean:
            raise ValueError(
                f"pattern {content.key!r} averages blocks, each with a softmax of its own, so nothing can be united with it; "
                "set merge='lse'"
            )
        held = parts_of(rest, replace(known.scope, length=segment.length))
        parts = with_global_positions(held, segment.global_positions)
    if words is not None and key.shape[2] > tokens:
        # what is no token has words of its own
        generator = torch.Generator().manual_seed(int(words[1].sum()) % 2**32)
        more = torch.empty(key.shape[2] - tokens, dtype=torch.int32, device="cpu")
        more.random_(-(1 << 31), 1 << 31, generator=generator)
        words = words[0], torch.cat([words[1], more.to(words[1].device)])
    slots = SlotCall(assignment, heads, call.is_causal, call.scale, positions, call.dropout, words, parts)
    if call.backend == "flex":
        return flex_slot_attention(query, key, value, slots)
    if call.backend != "dense":
        return slot_attention(query, key, value, slots, known.held.get("shares"))
    if assignment.is_mean:
        raise ValueError(
            "backend 'dense' has one softmax for each query and does not serve means; pass backend='gather'"
        )
    counts = slots.counts(query.shape[0], key.shape[2])
    bias = counts.to(query.dtype).log() if bool((counts > 1).any()) else None
    return dense_attention(query, key, value, counts > 0, words, scale=call.scale, dropout=call.dropout, bias=bias)


def _by_position(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, call: ContentCall
) -> tuple[Tensor, Tensor]:
    """Attend along a pattern that knows positions alone."""
    masks = (call.key_padding_mask, call.global_mask, call.document_ids, None, None)
    settings: dict[str, Any] = {
        "pattern": pattern.json,
        "layer": call.layer,
        "is_causal": call.is_causal,
        "head_offset": call.head_offset,
        "num_heads": call.num_heads,
        "rows": "all",
    }
    held = {"scale": call.scale, "dropout": call.dropout}
    if call.backend == "flex":
        scope = Scope(key.shape[2], query.shape[1], call.layer, call.is_causal, call.head_offset, call.num_heads)
        device = query.device.type
        choose_backend("flex", pattern, scope, device, can_flex=True, is_plain=False, dropout=call.dropout)
        return cuda_backend("flex")(query, key, value, *masks, call.seed, **settings, **held)
    if call.backend != "dense":
        return gather_attention(query, key, value, *masks, call.seed, **settings, **held, may_be_whole=False)
    words = None
    if call.seed is not None:
        words = draw_words(call.seed, *query.shape[:3], key.shape[2], query.device)
    return dense_attention(query, key, value, draw_edges(query, key, *masks, **settings), words, **held)


def _by_head(query: Tensor, key: Tensor, value: Tensor, pattern: ByHead, call: ContentCall) -> tuple[Tensor, Tensor]:
    """Give each head its member, neighbours that have the same one together."""
    ratio = query.shape[1] // key.shape[1]
    member = {head: i for i, group in enumerate(pattern.heads) for head in group}
    parts, first = [], 0
    while first < query.shape[1]:
        last = first + 1
        own = member[call.head_offset + first]
        while last < query.shape[1] and member[call.head_offset + last] == own:
            last += 1
        at = torch.arange(first, last, device=query.device) // ratio
        # each has its own dropout
        seed = None if call.seed is None else call.seed + first
        held = replace(call, head_offset=call.head_offset + first, seed=seed)
        parts.append(content_attention(query[:, first:last], key[:, at], value[:, at], pattern.patterns[own], held))
        first = last
    out, lse = (torch.cat(held, 1) for held in zip(*parts, strict=True))
    return out, lse


def _split(pattern: Pattern) -> tuple[ContentPattern | None, Pattern | None]:
    """Return the content-based member of a pattern, and what is read beside it."""
    members = pattern.patterns if isinstance(pattern, Union) else (pattern,)
    content = [member for member in members if member.is_content_based]
    others = tuple(member for member in members if not member.is_content_based)
    if len(content) > 1 or any(not isinstance(member, ContentPattern) for member in content):
        named = ", ".join(repr(member.key) for member in content)
        raise ValueError(f"at most one member of a union may be content-based, got {named}; by_head can hold several")
    if content and content[0].always is not None:  # type: ignore[attr-defined]
        others = (content[0].always, *others)  # type: ignore[attr-defined]
    rest = None if not others else others[0] if len(others) == 1 else Union(others)
    return (content[0] if content else None), rest  # type: ignore[return-value]


def _with_real_nodes(mask: Tensor | None, nodes: int) -> Tensor | None:
    """Return a padding mask in which the last columns, which are no tokens, count where their row has any token."""
    if mask is None or not nodes:
        return mask
    tokens = mask[:, :-nodes]
    return torch.cat([tokens, tokens.any(1, keepdim=True).expand(-1, nodes)], 1)


def _sequences(query: Tensor, call: ContentCall, nodes: int) -> Iterator[tuple[slice, slice | Tensor, Segment, Tensor]]:
    """Yield rows that hold the same kind of sequence, where its real tokens stand, and their logical positions."""
    segments = find_segments(
        query.shape[0],
        query.shape[2],
        key_padding_mask=_with_real_nodes(call.key_padding_mask, nodes),
        document_ids=call.document_ids,
        global_mask=call.global_mask,
    )
    first = 0
    while first < len(segments):
        segment, last = segments[first], first
        while last + 1 < len(segments) and segments[last + 1].is_like(segment, segments[last].row + 1):
            last += 1
        rows = slice(segment.row, segments[last].row + 1)
        positions = torch.arange(segment.length, device=query.device)
        at: slice | Tensor = slice(segment.start, segment.stop)
        if segment.invalid:
            is_real = torch.ones(segment.length, dtype=torch.bool, device=query.device)
            is_real[list(segment.invalid)] = False
            positions = positions[is_real]
            at = segment.start + positions
        yield rows, at, segment, positions
        first = last + 1


def _of_sequence(tensor: Tensor, rows: slice, at: slice | Tensor) -> Tensor:
    """Return rows and tokens of ``[B, H, N, ...]``: if they are all there are, the tensor itself."""
    if isinstance(at, slice) and (rows, at) == (slice(0, tensor.shape[0]), slice(0, tensor.shape[2])):
        # the gradient of a part is a new tensor with zeros around it
        return tensor
    return tensor[rows][:, :, at]


def _joined(
    parts: list[tuple[slice, slice | Tensor, tuple[Tensor, Tensor]]], query: Tensor, value: Tensor, *, is_whole: bool
) -> tuple[Tensor, Tensor]:
    """Put what sequences gave where they stand; the rest reads nothing."""
    if is_whole:
        return parts[0][2]
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], float("-inf"))
    for rows, at, found in parts:
        out[rows, :, at], lse[rows, :, at] = found
    return out, lse


def _united(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two attentions over different keys into one softmax."""
    is_empty = (one[1] == float("-inf")) & (other[1] == float("-inf"))
    # where both are -inf a logsumexp has no gradient
    held = [lse.masked_fill(is_empty, 0.0) for _, lse in (one, other)]
    share = (held[1] - held[0]).sigmoid()
    # in one pass; where both are empty both are 0
    out = one[0].lerp(other[0], share[..., None])
    return out, torch.logaddexp(*held).masked_fill(is_empty, float("-inf"))


def _with_self(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, is_real: Tensor
) -> tuple[Tensor, Tensor]:
    """Let a real token that reads nothing read itself."""
    is_alone = (lse == float("-inf")) & is_real[:, None]
    if not is_alone.any():
        return out, lse
    ratio = query.shape[1] // key.shape[1]
    k, v = (t.repeat_interleave(ratio, 1) if ratio > 1 else t for t in (key, value))
    return torch.where(is_alone[..., None], v, out), torch.where(is_alone, (query * k).sum(-1) * scale, lse)
