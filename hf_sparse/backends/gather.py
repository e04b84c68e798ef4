"""The ``gather`` backend: blocks of queries against the blocks they read, in plain torch, on any device.

Forward and backward are one custom operator each. Plans are built inside them from the pattern and from masks given as
tensors, so a compiled model sees two opaque calls and does not recompile when lengths, padding or global tokens change.
Half precision is computed in float32. No tensor of N x N is made.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.backends.dropout import draw_words
from hf_sparse.backends.execute import HUGE, inner_products, run_backward, run_forward
from hf_sparse.backends.kernels import Kernel, fused_backward, fused_forward, without_autocast
from hf_sparse.backends.labels import Distances, Labels
from hf_sparse.backends.lanes import Words
from hf_sparse.backends.plans import cached_plan
from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import Pattern, parts_of, pattern_from_json
from hf_sparse.plan import make_positional_plan
from hf_sparse.segments import find_segments, logical_length, places
from hf_sparse.tiles import Plan, Tile

# a stretch of a row, or what stands apart: tokens, and nodes behind the padding
Places = slice | Tensor


@torch.library.custom_op("hf_sparse::gather", mutates_args=())
@without_autocast
def gather_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
    scale: float,
    dropout: float,
    head_offset: int,
    num_heads: int,
    rows: str,
    may_be_whole: bool,
    softcap: float = 0.0,
    label_scores: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a pattern.

    Args:
        query: float ``[B, H, T, D]``.
        key: float ``[B, G, S, D]``.
        value: float ``[B, G, S, Dv]``.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        global_mask: bool ``[B, S]``, True = a global token.
        document_ids: int ``[B, S]``.
        query_positions: int64 ``[B, T]``, logical; given together with ``key_positions`` when queries are not the keys.
        key_positions: int64 ``[B, S]``, logical.
        seed: int64 ``[1]``, of the dropout; None without dropout.
        pattern: JSON of the pattern.
        layer: index of the layer.
        is_causal: whether keys ahead of the query are left out.
        scale: factor of the scores.
        dropout: probability of dropping an attention probability.
        head_offset: index of the first head held here.
        num_heads: heads of the whole layer.
        rows: "all" rows, "shared" ones or those of "own" projections; see ``make_plan``.
        may_be_whole: whether a short sequence may run in one tile under its whole mask, where that is faster.
        softcap: caps the scores by ``softcap * tanh(scores / softcap)``; 0 leaves them as they are.
        label_scores: float ``[B, H, T, V]``, added to the score of a query and a key of each label, for patterns with labels;
            or ``[H, 2 * M + 1]``, added by how far the key stands from the query, for distances from -M to M and beyond.
        segment_ids: int ``[B, S]``, the tokens of each node, for patterns that take them.

    Returns:
        Output ``[B, H, T, Dv]`` in the dtype of the query, and logsumexp ``[B, H, T]`` in float32 (float64 for float64).
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(exact) for t in (query, key, value))
    call = _Call(
        pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows, may_be_whole
    )
    kernel, words = Kernel(scale, dropout, softcap), call.words(q, k, seed)
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions, segment_ids)
    plans = list(call.plans(query, key, *masks))
    tile = None if softcap or label_scores is not None else _whole(plans, q, k, v, dropout)
    if tile is not None:
        out, lse = fused_forward(q, k, v, tile.mask, scale)
        return _laid_out(out, _by_token(query, value.shape[3])), lse.contiguous()
    out = _by_token(q, value.shape[3])
    plan = _only_plan(plans, q)
    if plan is None or not plan.writes_all:
        out.zero_()
    lse = q.new_full(query.shape[:3], float("-inf"))
    for batch, q_tokens, k_tokens, scope, plan in plans:
        held = q[batch, :, q_tokens], k[batch, :, k_tokens], v[batch, :, k_tokens]
        drawn = None if words is None else (words[0][batch, :, q_tokens], words[1][k_tokens])
        results = out[batch, :, q_tokens], lse[batch, :, q_tokens]
        labels = call.labels(label_scores, batch, q_tokens, scope, exact, masks[3:5])
        run_forward(plan, kernel, *held, drawn, labels, *results)
        _put_back((out, lse), batch, q_tokens, results)
    return out.to(query.dtype), lse


@gather_attention.register_fake
def _(query, key, value, *_args):  # type: ignore[no-untyped-def]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _by_token(query, value.shape[3]), query.new_empty(query.shape[:3], dtype=exact)


@torch.library.custom_op("hf_sparse::gather_backward", mutates_args=())
@without_autocast
def _gather_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding_mask: Tensor | None,
    global_mask: Tensor | None,
    document_ids: Tensor | None,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    seed: Tensor | None,
    pattern: str,
    layer: int,
    is_causal: bool,
    scale: float,
    dropout: float,
    head_offset: int,
    num_heads: int,
    rows: str,
    may_be_whole: bool,
    softcap: float = 0.0,
    label_scores: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v, g, o = (t.to(exact) for t in (query, key, value, grad_out, out))
    # a query that reads nothing has no gradient
    top = lse.masked_fill(lse == float("-inf"), HUGE)
    call = _Call(
        pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows, may_be_whole
    )
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions, segment_ids)
    plans = list(call.plans(query, key, *masks))
    is_plain = grad_lse is None and label_scores is None and not softcap
    tile = _whole(plans, q, k, v, dropout) if is_plain else None
    nothing = query.new_empty(0)
    if tile is not None:
        found = fused_backward(g, q, k, v, o, top, tile.mask, scale)
        dq, dk, dv = (_laid_out(grad, like) for grad, like in zip(found, (query, key, value), strict=True))
        return dq, dk, dv, nothing
    kernel, words = Kernel(scale, dropout, softcap), call.words(q, k, seed)
    delta = inner_products(g, o)
    if grad_lse is not None:
        delta -= grad_lse
    tensors = (query, key, value, nothing if label_scores is None else label_scores)
    grads = [torch.zeros_like(t, dtype=exact) for t in tensors]
    if grads[3].dim() == 2:
        # millions of pairs may add up in one entry of a bias by distance
        grads[3] = grads[3].double()
    for batch, q_tokens, k_tokens, scope, plan in plans:
        inputs = q[batch, :, q_tokens], k[batch, :, k_tokens], v[batch, :, k_tokens]
        drawn = None if words is None else (words[0][batch, :, q_tokens], words[1][k_tokens])
        held = g[batch, :, q_tokens], delta[batch, :, q_tokens], top[batch, :, q_tokens]
        labels = call.labels(label_scores, batch, q_tokens, scope, exact, masks[3:5])
        stands = (q_tokens, k_tokens, k_tokens, q_tokens)
        # of label scores there may be none, and a bias by distance is for all rows
        dq, dk, dv, dl = (t[batch, :, at] if t.dim() == 4 else t for t, at in zip(grads, stands, strict=True))
        run_backward(plan, kernel, inputs, drawn, labels, held, (dq, dk, dv, dl))
        for grad, at, part in zip(grads, stands, (dq, dk, dv, dl), strict=True):
            if grad.dim() == 4:
                _put_back((grad,), batch, at, (part,))
    dq, dk, dv, dl = (grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))
    return dq, dk, dv, dl


@_gather_backward.register_fake
def _(_grad_out, _grad_lse, query, key, value, *_args):  # type: ignore[no-untyped-def]
    # the one before the last, where arguments that have their defaults are not left out
    held = next((arg for arg in _args[-2:] if isinstance(arg, Tensor) and arg.is_floating_point()), None)
    label_scores = query.new_empty(0) if held is None else held
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(label_scores)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9], *inputs[-2:])
    ctx.settings = inputs[9:-2]


def _autograd_backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, *masks, label_scores, segment_ids = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_labels = _gather_backward(
        grad_out, grad_lse, query, key, value, out, lse, *masks, *ctx.settings, label_scores, segment_ids
    )
    return (*grads, *[None] * (6 + len(ctx.settings)), None if label_scores is None else grad_labels, None)


gather_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


class _Call:
    """What stays the same over the sequences of one call."""

    def __init__(
        self,
        pattern: Pattern,
        layer: int,
        is_causal: bool,
        heads: int,
        head_offset: int,
        num_heads: int,
        rows: str,
        may_be_whole: bool,
    ) -> None:
        self.pattern, self.is_causal, self.rows, self.may_be_whole = pattern, is_causal, rows, may_be_whole
        self.heads, self.head_offset, self.num_heads = heads, head_offset, num_heads
        self.layer = layer if pattern.varies_by_layer else 0

    def words(self, query: Tensor, key: Tensor, seed: Tensor | None) -> Words | None:
        return None if seed is None else draw_words(seed, *query.shape[:3], key.shape[2], query.device)

    def labels(
        self,
        scores: Tensor | None,
        batch: slice,
        at: Places,
        scope: Scope,
        exact: torch.dtype,
        positions: tuple[Tensor | None, ...],
    ) -> Labels | Distances | None:
        """Return the label scores of a sequence, whose tokens and nodes stand at ``at``, or its bias by distance."""
        if scores is None:
            return None
        if scores.dim() == 2:
            queries = keys = torch.arange(scope.total, device=scores.device)
            if positions[0] is not None and positions[1] is not None:
                queries, keys = positions[0][batch.start], positions[1][batch.start]
            return Distances(scores.to(exact), queries, keys)
        held = scores[batch, :, at].to(exact)
        return Labels(held, lambda q, k: self.pattern.label(q, k, scope), held.shape[2])

    def plans(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        global_mask: Tensor | None,
        document_ids: Tensor | None,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        segment_ids: Tensor | None,
    ) -> Iterator[tuple[slice, Places, Places, Scope, Plan]]:
        """Yield rows of the batch, where their queries and keys stand, their scope, and the plan that serves them."""
        batch, tokens = key.shape[0], key.shape[2]
        if query_positions is not None and key_positions is not None:
            for row in range(batch):
                positions = query_positions[row].cpu(), key_positions[row].cpu()
                real = torch.ones(tokens, dtype=torch.bool, device="cpu")
                if key_padding_mask is not None:
                    real = key_padding_mask[row].cpu()
                held = None if global_mask is None else tuple(positions[1][global_mask[row].cpu()].tolist())
                length = logical_length(positions[1], real, reads_padding=self.pattern.reads_padding)
                scope = self._scope(length)
                parts = with_global_positions(parts_of(self.pattern, scope), held)
                plan = make_positional_plan(parts, scope, *positions, real, rows=self.rows)
                yield slice(row, row + 1), slice(None), slice(None), scope, plan
            return
        tokens = self.pattern.num_tokens(tokens)
        segments = find_segments(
            batch,
            tokens,
            key_padding_mask=key_padding_mask,
            document_ids=document_ids,
            global_mask=global_mask,
            reads_padding=self.pattern.reads_padding,
            segment_ids=segment_ids,
            most_nodes=self.pattern.num_nodes(tokens),
        )
        first = 0
        while first < len(segments):
            # neighbouring rows that hold the same kind of sequence are run together
            segment, last = segments[first], first
            while last + 1 < len(segments) and segments[last + 1].is_like(segment, segments[last].row + 1):
                last += 1
            scope = self._scope(segment.length, segment.spans)
            plan = cached_plan(
                self.pattern, scope, segment.global_positions, segment.invalid, self.rows, self.may_be_whole
            )
            at = places(segment, tokens, scope.nodes)
            yield slice(segment.row, segments[last].row + 1), at, at, scope, plan
            first = last + 1

    def _scope(self, length: int, spans: tuple[tuple[int, int], ...] | None = None) -> Scope:
        nodes = self.pattern.nodes_of(length, spans)
        return Scope(length, self.heads, self.layer, self.is_causal, self.head_offset, self.num_heads, nodes, spans)


def _only_plan(plans: list[tuple[slice, Places, Places, Scope, Plan]], query: Tensor) -> Plan | None:
    """Return the plan that serves all rows and tokens, if one does."""
    if len(plans) != 1:
        return None
    batch, tokens, _, _, plan = plans[0]
    is_all = (batch, tokens) == (slice(0, query.shape[0]), slice(0, query.shape[2]))
    return plan if is_all else None


def _whole(
    plans: list[tuple[slice, Places, Places, Scope, Plan]], query: Tensor, key: Tensor, value: Tensor, dropout: float
) -> Tile | None:
    """Return the tile that is the whole call, if one is and torch's fused kernel serves it."""
    if dropout or query.device.type != "cpu" or query.shape != key.shape or query.shape != value.shape:
        return None
    plan = _only_plan(plans, query)
    if plan is None or len(plan.groups) != 1 or not plan.is_whole or len(plan.groups[0].invalid):
        return None
    (work,) = plan.groups[0].work
    return work if isinstance(work, Tile) else None


def _put_back(whole: tuple[Tensor, ...], rows: slice, at: Places, held: tuple[Tensor, ...]) -> None:
    """Write back what stood apart and was therefore copied; of a stretch what was held is a view."""
    if isinstance(at, Tensor):
        for tensor, part in zip(whole, held, strict=True):
            tensor[rows, :, at] = part


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in the dtype and the layout of a gradient of ``like``."""
    wanted = torch.empty_like(like)
    if tensor.dtype == wanted.dtype and tensor.stride() == wanted.stride():
        return tensor
    return wanted.copy_(tensor)


def _by_token(like: Tensor, width: int) -> Tensor:
    """Return an empty ``[B, H, T, width]`` laid out as ``[B, T, H, width]``, which transformers reads and torch writes."""
    batch, heads, tokens = like.shape[:3]
    return like.new_empty(batch, tokens, heads, width).transpose(1, 2)
