"""Global tokens by task: what a head marks when the caller marks nothing."""

import warnings
from typing import Any

import torch
from torch import Tensor

from hf_sparse.global_rows import names_global_tokens
from hf_sparse.patterns import Pattern

_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def default_global_mask(
    class_name: str,
    config: Any,
    patterns: list[Pattern],
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
) -> Tensor | None:
    """Return the global tokens of a task head, as in the in-tree Longformer.

    Classification marks the first real token (CLS); extractive question answering marks the question, which is all
    before the first separator. Other heads mark nothing, and neither does one whose pattern names its own tokens.

    Args:
        class_name: of the model.
        config: of the model; question answering reads ``sep_token_id`` or ``eos_token_id``.
        patterns: the patterns of the model's layers.
        input_ids: int64 ``[B, S]`` or ``[B, choices, S]``, or None.
        inputs_embeds: float ``[B, S, hidden_size]`` or with choices, in place of ids, or None.
        attention_mask: ``[B, S]`` or with choices, nonzero = a real token; other forms tell nothing here.

    Returns:
        bool ``[B, S]`` (choices folded into the batch), or None where there is nothing to mark.

    Raises:
        ValueError: if a question is to be marked and no separator is known.
    """
    if not all(p.has_global_tokens for p in patterns) or any(names_global_tokens(p) for p in patterns) or not patterns:
        return None
    if input_ids is not None:
        shape, device = input_ids.shape, input_ids.device
    elif inputs_embeds is not None:
        shape, device = inputs_embeds.shape[:-1], inputs_embeds.device
    else:
        return None
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
        real = attention_mask != 0
    real = real.flatten(0, -2)
    if class_name.endswith(_FIRST_TOKEN_HEADS):
        return torch.zeros_like(real).scatter(1, real.int().argmax(1, keepdim=True), True)
    if class_name.endswith("ForQuestionAnswering"):
        if input_ids is None:
            warnings.warn(
                "no token is global: inputs_embeds do not show where the question ends; pass global_attention_mask",
                stacklevel=2,
            )
            return None
        return _is_question(class_name, config, input_ids.flatten(0, -2)) & real
    return None


def _is_question(class_name: str, config: Any, ids: Tensor) -> Tensor:
    separator = getattr(config, "sep_token_id", None)
    separator = separator if separator is not None else getattr(config, "eos_token_id", None)
    if separator is None:
        raise ValueError(
            f"{class_name} marks the question as global, but its config has no sep_token_id; set "
            "model.config.sep_token_id = tokenizer.sep_token_id, or pass global_attention_mask"
        )
    end = (ids == separator).int().argmax(1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device)[None, :] < end.clamp(min=1)
