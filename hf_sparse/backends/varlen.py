"""The ``varlen`` backend: FlashAttention over packed sequences with a window, for CUDA and half precision.

It serves patterns of one plain window on all heads. Padding and packing cost nothing: only real tokens are packed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse.backends.kernels import without_autocast
from hf_sparse.parts import Globals, Scope, Window
from hf_sparse.patterns import Pattern, pattern_from_json
from hf_sparse.segments import Segment, find_segments


@torch.compiler.disable
@without_autocast
def varlen_window_attention(
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
    """Run a pattern; arguments and results as for ``gather_attention``, but the logsumexp has no gradient.

    Raises:
        ValueError: if this is no plain window over whole sequences in half precision on CUDA; the message says why.
    """
    width = query.shape[3]
    for name, is_there in (
        (f"device {query.device.type}", query.device.type != "cuda"),
        (f"dtype {query.dtype}", query.dtype not in (torch.float16, torch.bfloat16)),
        (f"heads of width {width} and {value.shape[3]}", width % 8 or width > 256 or value.shape[3] != width),
        ("dropout", dropout),
        ("a global mask", global_mask is not None),
        ("queries that are not the keys", query_positions is not None),
    ):
        if is_there:
            raise _unserved(name)
    batch, heads, tokens = query.shape[:3]
    window = window_of(pattern_from_json(pattern), Scope(tokens, heads, layer, is_causal, head_offset, num_heads))
    segments = find_segments(batch, tokens, key_padding_mask=key_padding_mask, document_ids=document_ids)
    return packed_attention(query, key, value, segments, window=window, scale=scale, kernel=_kernel())


def _kernel() -> Callable[..., Any]:
    # torch 2.11, the least that this package asks for, has it in another form
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return functools.partial(varlen_attn, return_aux=AuxRequest(lse=True))


def window_of(pattern: Pattern, scope: Scope) -> tuple[int, int]:
    """Return how far the one window of a pattern reaches behind and ahead, in tokens; -1 has no end.

    Raises:
        ValueError: if the pattern is anything else.
    """
    parts = [part for part in pattern.parts(scope) if not (isinstance(part, Globals) and not part.positions)]
    window = parts[0] if len(parts) == 1 else None
    if not isinstance(window, Window) or window.dilation != 1 or window.heads is not None:
        raise _unserved(f"pattern {pattern.key!r}, which is not one plain window")
    before, after = (-1 if reach is None else reach for reach in (window.before, window.after))
    return before, 0 if scope.is_causal else after


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    *,
    window: tuple[int, int],
    scale: float,
    kernel: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """Pack the tokens of all segments, ascending, behind one another, attend, and put the results where they were.

    ``kernel`` is ``varlen_attn`` with the logsumexp asked for, or what a test puts in its place; it returns the logsumexp as
    ``[H, tokens]``.

    Raises:
        ValueError: if a segment has holes.
    """
    if any(segment.invalid for segment in segments):
        raise _unserved("a key_padding_mask with holes between real tokens")
    batch, heads, tokens = query.shape[:3]
    lengths = [segment.stop - segment.start for segment in segments]
    if not lengths:
        nothing = torch.ones((), dtype=torch.bool, device=query.device)
        return query.masked_fill(nothing, 0.0), query[..., 0].detach().float().fill_(float("-inf"))
    at = torch.cat([torch.arange(s.start, s.stop) + s.row * tokens for s in segments]).to(query.device)
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(query.device)
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]
    if len(at) < batch * tokens:
        packed = [t.index_select(0, at) for t in packed]
    out, lse = kernel(
        *packed,
        ends,
        ends,
        max(lengths),
        max(lengths),
        scale=scale,
        window_size=window,
        enable_gqa=heads != key.shape[1],
    )
    whole = out.new_zeros(batch * tokens, *out.shape[1:]).index_copy(0, at, out)
    whole_lse = lse.new_full((heads, batch * tokens), float("-inf")).index_copy(1, at, _WithoutGradient.apply(lse))
    return whole.unflatten(0, (batch, tokens)).transpose(1, 2), whole_lse.unflatten(1, (batch, tokens)).transpose(0, 1)


class _WithoutGradient(torch.autograd.Function):
    """Refuses the gradient that torch's kernel would leave out in silence."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor) -> Tensor:
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, *_grad: Tensor) -> Tensor:
        raise ValueError("backend 'varlen' has no gradient of the logsumexp; pass backend='flex'")


def _unserved(what: str) -> ValueError:
    return ValueError(f"backend 'varlen' does not serve {what}; pass backend='flex' or 'gather'")
