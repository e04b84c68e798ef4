"""The ``gather`` backend: blocks of queries against the blocks they read, in plain torch, on any device.

Forward and backward are one custom operator each. Plans are built inside them from the pattern and from masks given as
tensors, so a compiled model sees two opaque calls and does not recompile when lengths, padding or global tokens change.
Half precision is computed in float32. No tensor of N x N is made.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_sparse.backends.kernels import Kernel, without_autocast
from hf_sparse.parts import Scope, with_global_positions
from hf_sparse.patterns import Pattern, pattern_from_json
from hf_sparse.plan import make_plan, make_positional_plan
from hf_sparse.segments import find_segments, logical_length
from hf_sparse.tiles import Gather, Group, Plan, Run, Tile


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

    Returns:
        Output ``[B, H, T, Dv]`` in the dtype of the query, and logsumexp ``[B, H, T]`` in float32 (float64 for float64).
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (_readable(t, exact) for t in (query, key, value))
    out = q.new_zeros(*query.shape[:3], value.shape[3])
    lse = q.new_full(query.shape[:3], float("-inf"))
    call = _Call(pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows)
    kernel = _kernel(scale, dropout, seed, query.device)
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions)
    for batch, q_tokens, k_tokens, plan in call.plans(query, key, *masks):
        held = q[batch, :, q_tokens], k[batch, :, k_tokens], v[batch, :, k_tokens]
        _forward(plan, kernel, *held, out[batch, :, q_tokens], lse[batch, :, q_tokens])
    return out.to(query.dtype), lse


@gather_attention.register_fake
def _(query, key, value, *_args):  # type: ignore[no-untyped-def]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3], dtype=exact)


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
) -> tuple[Tensor, Tensor, Tensor]:
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v, g, o = (_readable(t, exact) for t in (query, key, value, grad_out, out))
    # a query that reads nothing has no gradient: against +inf all its probabilities are 0
    top = lse.masked_fill(lse == float("-inf"), 1e30)
    grads = [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    call = _Call(pattern_from_json(pattern), layer, is_causal, query.shape[1], head_offset, num_heads, rows)
    kernel = _kernel(scale, dropout, seed, query.device)
    masks = (key_padding_mask, global_mask, document_ids, query_positions, key_positions)
    for batch, q_tokens, k_tokens, plan in call.plans(query, key, *masks):
        inputs = tuple(t[batch, :, tokens] for t, tokens in ((q, q_tokens), (k, k_tokens), (v, k_tokens)))
        held = tuple(t[batch, :, q_tokens] for t in (g, o, top))
        held_lse = None if grad_lse is None else grad_lse[batch, :, q_tokens]
        sums = tuple(t[batch, :, tokens] for t, tokens in zip(grads, (q_tokens, k_tokens, k_tokens), strict=True))
        _backward(plan, kernel, inputs, held, held_lse, sums)
    dq, dk, dv = (grad.to(query.dtype) for grad in grads)
    return dq, dk, dv


@_gather_backward.register_fake
def _(_grad_out, _grad_lse, query, key, value, *_args):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:9])
    ctx.settings = inputs[9:]


def _autograd_backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, *masks = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _gather_backward(grad_out, grad_lse, query, key, value, out, lse, *masks, *ctx.settings)
    return (*grads, *[None] * (6 + len(ctx.settings)))


gather_attention.register_autograd(_autograd_backward, setup_context=_setup_context)


@functools.lru_cache(maxsize=64)
def cached_plan(
    pattern: Pattern, scope: Scope, global_positions: tuple[int, ...] | None, invalid: tuple[int, ...], rows: str
) -> Plan:
    """Return the plan of a pattern on one sequence; equal calls get the same object."""
    parts = with_global_positions(pattern.parts(scope), global_positions)
    return make_plan(parts, scope, invalid=invalid, rows=rows)


class _Call:
    """What stays the same over the sequences of one call."""

    def __init__(
        self, pattern: Pattern, layer: int, is_causal: bool, heads: int, head_offset: int, num_heads: int, rows: str
    ) -> None:
        self.pattern, self.is_causal, self.rows = pattern, is_causal, rows
        self.heads, self.head_offset, self.num_heads = heads, head_offset, num_heads
        self.layer = layer if pattern.varies_by_layer else 0

    def plans(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        global_mask: Tensor | None,
        document_ids: Tensor | None,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
    ) -> Iterator[tuple[slice, slice, slice, Plan]]:
        """Yield rows of the batch, their query and key tokens, and the plan that serves them."""
        batch, tokens = key.shape[0], key.shape[2]
        if query_positions is not None and key_positions is not None:
            for row in range(batch):
                positions = query_positions[row].cpu(), key_positions[row].cpu()
                real = torch.ones(tokens, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[row].cpu()
                held = None if global_mask is None else tuple(positions[1][global_mask[row].cpu()].tolist())
                length = logical_length(positions[1], real, reads_padding=self.pattern.reads_padding)
                scope = self._scope(length)
                parts = with_global_positions(self.pattern.parts(scope), held)
                plan = make_positional_plan(parts, scope, *positions, real, rows=self.rows)
                yield slice(row, row + 1), slice(None), slice(None), plan
            return
        segments = find_segments(
            batch,
            tokens,
            key_padding_mask=key_padding_mask,
            document_ids=document_ids,
            global_mask=global_mask,
            reads_padding=self.pattern.reads_padding,
        )
        first = 0
        while first < len(segments):
            # neighbouring rows that hold the same kind of sequence are run together
            segment, last = segments[first], first
            while last + 1 < len(segments) and segments[last + 1].is_like(segment, segments[last].row + 1):
                last += 1
            scope = self._scope(segment.stop - segment.start)
            plan = cached_plan(self.pattern, scope, segment.global_positions, segment.invalid, self.rows)
            at = slice(segment.start, segment.stop)
            yield slice(segment.row, segments[last].row + 1), at, at, plan
            first = last + 1

    def _scope(self, length: int) -> Scope:
        return Scope(length, self.heads, self.layer, self.is_causal, self.head_offset, self.num_heads)


def _readable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a dtype and with its last dimension dense, as the fused kernel needs it."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _kernel(scale: float, dropout: float, seed: Tensor | None, device: torch.device) -> Kernel:
    if not dropout or seed is None:
        return Kernel(scale)
    return Kernel(scale, dropout, torch.Generator(device).manual_seed(int(seed)))


class _Heads:
    """The tensors of one group of heads, and the key heads its query heads read."""

    def __init__(self, group: Group, query: Tensor, key: Tensor) -> None:
        first, last = group.heads[0], group.heads[-1]
        self.is_range = last - first + 1 == len(group.heads)
        self.q: slice | list[int] = slice(first, last + 1) if self.is_range else list(group.heads)
        ratio = query.shape[1] // key.shape[1]
        self.key_of = [head // ratio for head in group.heads]
        same = ratio == 1 and self.is_range
        self.k: slice | Tensor = (
            self.q if same and isinstance(self.q, slice) else torch.tensor(self.key_of, device=key.device)
        )

    def keys(self, tensor: Tensor, tokens: slice | Tensor) -> Tensor:
        return tensor[:, :, tokens][:, self.k]

    def add(self, total: Tensor, tokens: slice | Tensor, grad: Tensor) -> None:
        if isinstance(self.k, slice):
            if isinstance(tokens, slice):
                total[:, self.k, tokens] += grad
            else:
                total[:, self.k].index_add_(2, tokens.to(total.device), grad)
        elif isinstance(tokens, slice):
            total[:, :, tokens].index_add_(1, self.k, grad)
        else:
            at = total[:, :, tokens].index_add_(1, self.k, grad)
            total[:, :, tokens] = at


def _forward(plan: Plan, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    for group in plan.groups:
        heads = _Heads(group, q, k)
        # writing to a range of heads writes through; scattered heads are copied back
        q_held, out_held, lse_held = q[:, heads.q], out[:, heads.q], lse[:, heads.q]
        for work in group.work:
            if isinstance(work, Tile):
                tokens = work.q
                part = kernel.forward(q_held[:, :, tokens], heads.keys(k, work.k), heads.keys(v, work.k), work.mask)
                if isinstance(tokens, slice):
                    _merge(out_held[:, :, tokens], lse_held[:, :, tokens], *part, is_first=work.is_first)
                else:
                    merged = out_held[:, :, tokens], lse_held[:, :, tokens]
                    _merge(*merged, *part, is_first=work.is_first)
                    out_held[:, :, tokens], lse_held[:, :, tokens] = merged
                continue
            for row, head, key_head in _lanes(work, heads, q):
                part = kernel.forward(
                    _queries(work, q_held[row, head])[:, None],
                    _keys(work, k[row, key_head])[:, None],
                    _keys(work, v[row, key_head])[:, None],
                    work.mask,
                )
                o, at = _queries(work, out_held[row, head]), _queries(work, lse_held[row, head])
                _merge(o, at, part[0][:, 0], part[1][:, 0], is_first=work.is_first)
        if len(group.invalid):
            out_held[:, :, group.invalid], lse_held[:, :, group.invalid] = 0.0, float("-inf")
        if not isinstance(heads.q, slice):
            out[:, heads.q], lse[:, heads.q] = out_held, lse_held


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, *, is_first: bool) -> None:
    """Add a tile to what other tiles gave the same queries, in place."""
    if is_first:
        out.copy_(part)
        lse.copy_(part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    safe = total.masked_fill(total == float("-inf"), 0.0)
    out.mul_((lse - safe).exp_()[..., None]).add_(part * (part_lse - safe).exp_()[..., None])
    lse.copy_(total)


def _backward(
    plan: Plan,
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    held: tuple[Tensor, ...],
    grad_lse: Tensor | None,
    sums: tuple[Tensor, ...],
) -> None:
    q, k, v = inputs
    for group in plan.groups:
        heads = _Heads(group, q, k)
        q_held, grad_q = q[:, heads.q], sums[0][:, heads.q]
        grad_out, out, lse = (t[:, heads.q] for t in held)
        lse_grad = None if grad_lse is None else grad_lse[:, heads.q]
        inner_grad, inner_lse_grad = grad_out, lse_grad
        if len(group.rows):
            # what other tiles gave to the rows of global tokens was overwritten
            inner_grad = grad_out.index_fill(2, group.rows.to(q.device), 0.0)
            inner_lse_grad = None if lse_grad is None else lse_grad.index_fill(2, group.rows.to(q.device), 0.0)
        for work in group.work:
            if isinstance(work, Tile):
                gradient, of_lse = (grad_out, lse_grad) if work.is_row else (inner_grad, inner_lse_grad)
                at = work.q
                dq, dk, dv = kernel.backward(
                    gradient[:, :, at],
                    q_held[:, :, at],
                    heads.keys(k, work.k),
                    heads.keys(v, work.k),
                    work.mask,
                    out[:, :, at],
                    lse[:, :, at],
                    None if of_lse is None else of_lse[:, :, at],
                )
                grad_q[:, :, at] += dq
                heads.add(sums[1], work.k, dk)
                heads.add(sums[2], work.k, dv)
                continue
            for row, head, key_head in _lanes(work, heads, q):
                dq, dk, dv = kernel.backward(
                    _queries(work, inner_grad[row, head])[:, None],
                    _queries(work, q_held[row, head])[:, None],
                    _keys(work, k[row, key_head])[:, None],
                    _keys(work, v[row, key_head])[:, None],
                    work.mask,
                    _queries(work, out[row, head])[:, None],
                    _queries(work, lse[row, head])[:, None],
                    None if inner_lse_grad is None else _queries(work, inner_lse_grad[row, head])[:, None],
                )
                _queries(work, grad_q[row, head]).add_(dq[:, 0])
                _add_keys(work, sums[1][row, key_head], dk[:, 0])
                _add_keys(work, sums[2][row, key_head], dv[:, 0])
        if not isinstance(heads.q, slice):
            sums[0][:, heads.q] = grad_q


def _lanes(work: Run | Gather, heads: _Heads, query: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield row, head within the group, and key head: one at a time, so that a lane's keys stay in the cache."""
    served = work.heads if isinstance(work, Gather) else range(len(heads.key_of))
    for row in range(query.shape[0]):
        for head in served:
            yield row, head, heads.key_of[head]


def _queries(work: Run | Gather, lane: Tensor) -> Tensor:
    """Return the blocks of queries of a lane ``[n, ...]`` as a view ``[blocks, block, ...]``."""
    if isinstance(work, Gather):
        return lane[work.first : work.first + len(work.index) * work.block].unflatten(0, (len(work.index), work.block))
    tokens = lane[work.offset :: work.step][work.first : work.first + work.blocks * work.block]
    return tokens.unflatten(0, (work.blocks, work.block))


def _keys(work: Run | Gather, lane: Tensor) -> Tensor:
    """Return the keys of each block ``[blocks, width, D]``: a view of a run, a copy of a gather."""
    if isinstance(work, Gather):
        return lane.index_select(0, work.index.flatten().to(lane.device)).view(*work.index.shape, -1)
    return _windows(work, lane[work.offset :: work.step], 0, work.width)


def _windows(work: Run, lane: Tensor, skip: int, width: int) -> Tensor:
    first = work.first - work.back + skip
    tokens = lane[first : first + (work.blocks - 1) * work.block + width]
    return tokens.unfold(0, width, work.block).transpose(1, 2)


def _add_keys(work: Run | Gather, total: Tensor, grad: Tensor) -> None:
    """Add the gradients of each block's keys ``[blocks, width, D]`` to the lane ``[n, D]`` they came from."""
    if isinstance(work, Gather):
        total.index_add_(0, work.index.flatten().to(total.device), grad.flatten(0, 1))
        return
    lane = total[work.offset :: work.step]
    for skip in range(0, work.width, work.block):
        # windows cut to one block do not overlap
        width = min(work.block, work.width - skip)
        _windows(work, lane, skip, width).add_(grad[:, skip : skip + width])
