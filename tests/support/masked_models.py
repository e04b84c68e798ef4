"""Dense models under a mask of any rule, by their own eager attention: an oracle; nothing here knows hf_sparse."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

_NAME = "oracle_of_tests"
_CROSS = ("encoder_attn", "crossattention", "EncDecAttention")


@contextlib.contextmanager
def under_a_mask(
    model: PreTrainedModel,
    allows: Callable[[int, int], bool],
    *,
    only: Callable[[nn.Module], bool] = lambda module: True,
) -> Iterator[PreTrainedModel]:
    """Let self-attention read only the pairs (query, key) that a rule allows, beside what the model itself leaves out.

    Args:
        model: a dense model.
        allows: (query, key) -> whether the query may read the key; both counted from the left edge of the row.
        only: which self-attention modules follow the rule.
    """
    crossing = {id(module) for name, module in model.named_modules() if name.endswith(_CROSS)}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        queries, keys = query.shape[2], key.shape[2]
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool) if mask is None else mask
        if id(module) not in crossing and only(module):
            drawn = torch.tensor([[allows(q, k) for k in range(keys)] for q in range(queries)])
            allowed = allowed & drawn
        additive = torch.zeros(allowed.shape, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
        return eager(module, query, key, value, additive, **given)

    def make_mask(**given: Any) -> Any:
        return sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    held = model.config._attn_implementation
    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, make_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield model
    finally:
        model.set_attn_implementation(held)
        AttentionInterface._global_mapping.pop(_NAME)
        AttentionMaskInterface._global_mapping.pop(_NAME)
