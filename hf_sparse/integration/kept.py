"""How much of a dense model's attention patterns keep, layer by layer and head by head, without a tensor of N x N."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hf_sparse.attention import sparse_attention
from hf_sparse.integration.attention import read_mask
from hf_sparse.integration.dense_layers import attend_densely
from hf_sparse.integration.layers import self_attention_modules
from hf_sparse.integration.mask import SparseMask, sparse_mask
from hf_sparse.patterns import Band, Pattern, Sinkhorn

_NAME = "hf_sparse:kept"
# columns of the identity that show at once which keys a content-based pattern has chosen
_COLUMNS = 512


@dataclass(frozen=True, eq=False)
class Kept:
    """What was noted of a dense model's attention, by layer as an entry of a config names it ("3", "encoder.3").

    Attributes:
        shares: float64 ``[P, H]`` of each layer: of each pattern and head the share of attention that falls on pairs which the
            pattern allows, mean over real queries; NaN where ``unkept_reason`` gives a reason.
        shapes: heads, key and value heads, and width of a head of each layer.
        calls: how often the model called each layer: ALBERT has one that is called as often as others have layers.
    """

    shares: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)


def unkept_reason(pattern: Pattern | None) -> str | None:
    """Return why no share of a dense model's attention can be said to be kept by a pattern; None where it can."""
    members: tuple[Pattern | None, ...] = getattr(pattern, "members", (pattern,))
    for member in members:
        if member is not None and member.has_nodes:
            return f"{member.key!r} reads nodes, which the dense model has not"
        if isinstance(member, Sinkhorn) and not member.hard:
            return f"{member.key!r} mixes blocks, so that no pair is kept as it was; set hard=true"
    return None


@contextlib.contextmanager
def noting_kept(model: PreTrainedModel, patterns: Mapping[str, Sequence[Pattern | None]]) -> Iterator[Kept]:
    """Let a model attend densely, and note what patterns would keep of it.

    The share of a query is the exponential of the difference of two logsumexps: that of the pattern and that of all keys. Of a
    content-based pattern it is summed over the pairs that are chosen, in float64.

    Args:
        model: a dense model; or a sparse one, which is then read as the dense model that it came from. For a content-based
            pattern one that holds its weights.
        patterns: of each self-attention layer, by its name in an entry; None keeps everything.

    Yields:
        What is noted. A call of the model replaces what the one before it left; of a layer that is called several times it is
        the mean over its calls.

    Raises:
        ValueError: from the model's call, if its attention cannot be computed (softcap, sinks, a foreign mask).
    """
    names = {
        id(module): f"{stack}.{index}" if stack else str(index)
        for stack, index, _, module in self_attention_modules(model)
    }
    kept = Kept()

    def attend_and_note(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        sparse_hidden_states: Tensor | None = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, None]:
        mask = read_mask(attention_mask, module, is_causal)
        window = sliding_window if mask.window is None else mask.window
        name = names.get(id(module))
        capped = "a softcap" if softcap is not None else "sinks" if s_aux is not None else None
        if mask.refusal is not None or capped is not None or (window is not None and not mask.is_causal):
            refused = mask.refusal or capped or f"the model's own sliding window of {window} tokens"
            raise ValueError(f"{type(module).__name__}: what patterns keep cannot be told under {refused}")
        terms = {"bias": position_bias}
        out = attend_densely(query, key, value, mask, window, 0.0, scaling, terms, is_cross=name is None)
        if name is not None:
            hidden = getattr(module, "_sparse_hidden", None) if sparse_hidden_states is None else sparse_hidden_states
            call = _Call(module, hidden, query, key, mask, window, scaling, position_bias, int(name.rpartition(".")[2]))
            shares = torch.stack([call.share(pattern) for pattern in patterns[name]])
            calls = kept.calls[name] = kept.calls.get(name, 0) + 1
            kept.shares[name] = shares if calls == 1 else kept.shares[name] + (shares - kept.shares[name]) / calls
            kept.shapes[name] = query.shape[1], key.shape[1], query.shape[3]
        return out.transpose(1, 2).contiguous(), None

    def begin(*_: Any) -> None:
        kept.calls.clear()

    handle = model.register_forward_pre_hook(begin)
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend_and_note)
    AttentionMaskInterface.register(_NAME, sparse_mask)
    try:
        model.set_attn_implementation(_NAME)
        yield kept
    finally:
        handle.remove()
        model.set_attn_implementation(before)
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


class _Call:
    """One attention call of a dense layer, and what patterns keep of it."""

    def __init__(
        self,
        module: nn.Module,
        hidden_states: Tensor | None,
        query: Tensor,
        key: Tensor,
        mask: SparseMask,
        window: int | None,
        scaling: float | None,
        bias: Tensor | None,
        layer: int,
    ) -> None:
        self.module, self.hidden_states = module, hidden_states
        self.query, self.key, self.padding = query, key, mask.padding
        self.scale = query.shape[3] ** -0.5 if scaling is None else scaling
        self.bias = bias
        self.settings: dict[str, Any] = {
            "is_causal": mask.is_causal,
            "key_padding_mask": mask.padding,
            "document_ids": mask.document_ids,
            "scale": self.scale,
            "layer": layer,
        }
        self.whole = self._lse(Band(radius=(window or key.shape[2]) - 1))

    def share(self, pattern: Pattern | None) -> Tensor:
        """Return the share that a pattern keeps, float64 ``[H]``, mean over real queries."""
        if pattern is None:
            return self.whole.new_ones(self.whole.shape[1])
        if unkept_reason(pattern) is not None:
            return self.whole.new_full((self.whole.shape[1],), float("nan"))
        shares = self._chosen_shares(pattern) if pattern.is_content_based else self._positional_shares(pattern)
        if self.padding is None:
            return shares.mean((0, 2))
        # a query that is padding reads nothing, and has no share
        return shares.where(self.padding[:, None], 0.0).sum((0, 2)) / self.padding.sum()

    def _positional_shares(self, pattern: Pattern) -> Tensor:
        """Return the share of each query on the keys that a pattern allows, float64 ``[B, H, T]``."""
        return (self._lse(pattern) - self.whole).exp()

    def _lse(self, pattern: Pattern) -> Tensor:
        """Return the logsumexp of the keys that a pattern allows, float64 ``[B, H, T]``."""
        # one column of values: no output is wanted
        value = self.key[..., :1]
        _, lse = sparse_attention(
            self.query, self.key, value, pattern, bias=self.bias, return_lse=True, **self.settings
        )
        return lse.double()

    def _chosen_shares(self, pattern: Pattern) -> Tensor:
        """Return the share of each query on the keys that a content-based pattern chooses, float64 ``[B, H, T]``."""
        if self.bias is not None:
            raise ValueError(f"pattern {pattern.key!r} is content-based and does not serve a bias of positions")
        query, key = self.query.double(), self.key.double()
        state = getattr(self.module, "sparse_state", None)
        held = {} if state is None else {"state": state, "hidden_states": self.hidden_states}
        ratio, tokens = query.shape[1] // key.shape[1], key.shape[2]
        shares = torch.zeros_like(self.whole)
        for first in range(0, tokens, _COLUMNS):
            columns = torch.eye(tokens, dtype=torch.float64, device=key.device)[:, first : first + _COLUMNS]
            value = columns.expand(*key.shape[:2], -1, -1)
            weights: Any = sparse_attention(query, key, value, pattern, **held, **self.settings)
            keys = key[:, :, first : first + _COLUMNS].repeat_interleave(ratio, 1)
            scores = query @ keys.transpose(2, 3) * self.scale  # [B, H, T, columns]
            shares += (scores - self.whole[..., None]).exp().where(weights > 0, 0.0).sum(-1)
        return shares
