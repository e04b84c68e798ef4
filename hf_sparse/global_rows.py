"""Rows that have projections of their own: those of Longformer's global tokens, and of Star's relays."""

import dataclasses
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hf_sparse.backends.dropout import draw_words, mix, threshold
from hf_sparse.backends.kernels import without_autocast
from hf_sparse.parts import Globals, Scope, with_global_positions
from hf_sparse.patterns import GlobalTokens, Longformer, Pattern, StarTransformer, parts_of
from hf_sparse.patterns.projections import GlobalProjections
from hf_sparse.segments import find_segments, places


def names_global_tokens(pattern: Pattern, *, with_projections: bool = False) -> bool:
    """Say whether a pattern names global tokens itself, in any member.

    Args:
        pattern: the pattern.
        with_projections: count only tokens, and nodes, whose rows have projections of their own.
    """
    if isinstance(pattern, StarTransformer):
        return pattern.relay_projections and with_projections
    if isinstance(pattern, Longformer):
        return bool(pattern.global_tokens) and (pattern.global_projections or not with_projections)
    if isinstance(pattern, GlobalTokens):
        return bool(pattern.positions) and not with_projections
    members = getattr(pattern, "members", ())
    return any(names_global_tokens(member, with_projections=with_projections) for member in members)


def with_unused(out: Tensor, state: nn.Module) -> Tensor:
    """Let weights that a call does not use take part with gradient 0: distributed training waits for all of them."""
    parameters = [p for p in state.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    return _WithUnused.apply(out, *parameters) if parameters else out


class _WithUnused(torch.autograd.Function):
    """Nothing but gradients of 0: adding 0 times a sum would copy the output."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def can_fold(state: nn.Module) -> TypeGuard[GlobalProjections]:
    """Say whether ``FewRows`` serves a state: whether its projections are plain: not adapted, quantized or offloaded."""
    if not isinstance(state, GlobalProjections):
        return False
    layers = (state.query, state.key, state.value)
    return all(type(layer) is nn.Linear and not hasattr(layer, "_hf_hook") for layer in layers)


def checked_hidden_states(hidden_states: Tensor | None, query: Tensor, key: Tensor, pattern: Pattern) -> Tensor:
    """Return the hidden states that projections of global tokens read.

    Raises:
        ValueError: if there are none, or not one for each key.
    """
    if hidden_states is None:
        raise ValueError("state was given without hidden_states, which its projections read")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"pattern {pattern.key!r} with global projections cannot serve cached decoding; set global_projections=False"
        )
    if hidden_states.shape[:2] != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"hidden_states must be [batch, tokens, width] of the key's {key.shape[0]} rows and {key.shape[2]} tokens, got "
            f"{list(hidden_states.shape)}"
        )
    return hidden_states


def put_rows(out: Tensor, lse: Tensor, row_out: Tensor, row_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Put rows computed apart, those with a finite logsumexp, in the place of others."""
    is_row = row_lse > float("-inf")
    return torch.where(is_row[..., None], row_out, out), torch.where(is_row, row_lse, lse)


class FewRows:
    """The rows of a few global tokens or nodes, computed without projecting the keys and values of all tokens.

    A score is ``q . (W h + b) = (q W) . h + q . b``, and an output ``p (h W + b) = (p h) W + sum(p) b``: for a few rows it is
    much less work to project the queries back, and the outputs at the end, than every token.

    Args:
        pattern: who reads whom.
        scope: of the call.
        state: the projections.
        hidden_states: float ``[B, S, hidden_size]``.
        masks: ``key_padding_mask``, ``global_mask`` and ``document_ids``.
    """

    def __init__(
        self,
        pattern: Pattern,
        scope: Scope,
        state: GlobalProjections,
        hidden_states: Tensor,
        masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> None:
        self.scope, self.state, self.hidden_states = scope, state, hidden_states
        batch, tokens = hidden_states.shape[:2]
        held_tokens = pattern.num_tokens(tokens)
        is_own = torch.zeros(batch, scope.heads, tokens, dtype=torch.bool, device="cpu")
        sequence = torch.full((batch, tokens), -1, device="cpu")
        padding, global_mask, documents = masks
        segments = find_segments(
            batch,
            held_tokens,
            key_padding_mask=padding,
            global_mask=global_mask,
            document_ids=documents,
            reads_padding=pattern.reads_padding,
        )
        for number, segment in enumerate(segments):
            held = dataclasses.replace(scope, length=segment.length, nodes=pattern.num_nodes(segment.length))
            at = torch.arange(tokens, device="cpu")[places(segment, held_tokens, held.nodes)]
            sequence[segment.row, at] = number
            sequence[segment.row, at[list(segment.invalid)]] = -1
            for part in with_global_positions(parts_of(pattern, held), segment.global_positions):
                if isinstance(part, Globals) and part.has_projections:
                    named = sorted(range(scope.heads) if part.heads is None else part.heads)
                    heads = torch.tensor(named, dtype=torch.int64, device="cpu")
                    positions = [p for p in part.positions if p < held.total]
                    is_own[segment.row, heads[:, None], at[positions]] = True
        is_own &= (sequence >= 0)[:, None]
        self.at = is_own.any(1).any(0).nonzero()[:, 0]
        self.is_own, self.sequence = is_own[:, :, self.at], sequence

    @property
    def is_worth_it(self) -> bool:
        """Whether this is less work than projecting every token."""
        return 2 * len(self.at) * self.scope.heads <= self.hidden_states.shape[2]

    def put(
        self, out: Tensor, lse: Tensor, seed: Tensor | None, *, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Compute the rows and put them in their place.

        Args:
            out: what the other tokens got, ``[B, H, T, D]``.
            lse: its logsumexp ``[B, H, T]``.
            seed: int64 ``[1]``, of the dropout; None without dropout.
            scale: factor of the scores.
            dropout: probability of dropping an attention probability.
        """
        if not len(self.at):
            return with_unused(out, self.state), lse
        at, is_own = self.at.to(out.device), self.is_own.to(out.device)
        rows, row_lse = self._rows(seed, scale=scale, dropout=dropout)
        rows = torch.where(is_own[..., None], self.state.finish(rows).to(out.dtype), out[:, :, at])
        row_lse = torch.where(is_own, row_lse.to(lse.dtype), lse[:, :, at])
        if out.requires_grad or rows.requires_grad:
            return out.index_copy(2, at, rows), lse.index_copy(2, at, row_lse)
        # nobody else holds them
        return out.index_copy_(2, at, rows), lse.index_copy_(2, at, row_lse)

    def _mask(self, device: torch.device) -> Tensor:
        """Return bool ``[B, H, g, S]``: what each row reads."""
        same = self.sequence[:, self.at, None] == self.sequence[:, None, :]
        if self.scope.is_causal:
            same = same & (torch.arange(same.shape[2], device="cpu") <= self.at[:, None])
        return (self.is_own[..., None] & same[:, None]).to(device)

    def _rows(self, seed: Tensor | None, *, scale: float, dropout: float) -> tuple[Tensor, Tensor]:
        """Return the rows ``[B, H, g, D]`` and their logsumexp ``[B, H, g]``."""
        exact = torch.float64 if self.hidden_states.dtype == torch.float64 else torch.float32
        width = self.state.head_dim
        weights = [
            t.to(exact)
            for layer in (self.state.query, self.state.key, self.state.value)
            for t in (layer.weight, layer.bias)
        ]
        return _attend_rows(
            self.hidden_states.to(exact),
            self.at.to(self.hidden_states.device),
            self._mask(self.hidden_states.device),
            weights,
            width,
            seed,
            scale,
            dropout,
        )


@without_autocast
def _attend_rows(
    hidden: Tensor,
    at: Tensor,
    mask: Tensor,
    weights: list[Tensor],
    width: int,
    seed: Tensor | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    query_weight, query_bias, key_weight, key_bias, value_weight, value_bias = weights
    (batch, heads, rows, tokens), key_heads = mask.shape, len(key_bias) // width
    query = nn.functional.linear(hidden[:, at], query_weight, query_bias) * scale
    # one matrix for each key head: the rows of all query heads that read it
    query = query.unflatten(-1, (heads, width)).transpose(1, 2).reshape(batch, key_heads, -1, width)
    back = query @ key_weight.unflatten(0, (key_heads, width))
    scores = back.flatten(1, 2) @ hidden.transpose(1, 2)
    scores = scores + (query @ key_bias.view(key_heads, width, 1)).flatten(1, 2)
    scores = scores.view(mask.shape).masked_fill(~mask, float("-inf"))
    is_empty = ~mask.any(-1, keepdim=True)
    lse = scores.masked_fill(is_empty, 0.0).logsumexp(-1, keepdim=True)
    probabilities = (scores - lse).exp().masked_fill(is_empty, 0.0)
    if seed is not None:
        words = draw_words(seed, batch, heads, tokens, tokens, hidden.device)
        is_kept = mix(words[0][:, :, at, None], words[1]) < threshold(dropout)
        probabilities = probabilities * is_kept / (1 - dropout)
    context = (probabilities.flatten(1, 2) @ hidden).view(batch, key_heads, -1, hidden.shape[2])
    out = context @ value_weight.unflatten(0, (key_heads, width)).transpose(1, 2)
    share = probabilities.sum(-1).view(batch, key_heads, -1, 1)
    out = out + share * value_bias.view(key_heads, 1, width)
    return out.reshape(batch, heads, rows, width), lse.masked_fill(is_empty, float("-inf"))[..., 0]
