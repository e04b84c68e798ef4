"""Global tokens by task: what a head marks when the caller marks nothing."""

from typing import Any

import torch
from torch import Tensor

from hf_sparse.attention import names_global_tokens
from hf_sparse.patterns import Pattern

_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")


def default_global_mask(
    class_name: str, config: Any, patterns: list[Pattern], input_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor | None:
    """Return the global tokens of a task head, as in the in-tree Longformer.

    Classification marks the first real token (CLS); extractive question answering marks the question, which is all
    before the first separator. Other heads mark nothing, and neither does one whose pattern names its own tokens.

    Args:
        class_name: of the model.
        config: of the model; question answering reads ``sep_token_id`` or ``eos_token_id``.
        patterns: the patterns of the model's layers.
        input_ids: int64 ``[B, S]`` or ``[B, choices, S]``; None where embeddings were given.
        attention_mask: ``[B, S]``, nonzero = a real token, or None.

    Returns:
        bool ``[B, S]`` (choices folded into the batch), or None where there is nothing to mark.

    Raises:
        ValueError: if a question is to be marked and no separator is known.
    """
    if not all(p.has_global_tokens for p in patterns) or any(names_global_tokens(p) for p in patterns) or not patterns:
        return None
    ids = None if input_ids is None else input_ids.flatten(0, -2)
    if class_name.endswith(_FIRST_TOKEN_HEADS):
        tokens = ids if ids is not None else attention_mask
        if tokens is None:
            return None
        first = torch.zeros(tokens.shape[0], 1, dtype=torch.int64, device=tokens.device)
        if attention_mask is not None and attention_mask.dim() <= 3:
            first = (attention_mask.flatten(0, -2) != 0).int().argmax(1, keepdim=True)
        return torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device).scatter(1, first, True)
    if class_name.endswith("ForQuestionAnswering"):
        if ids is None:
            return None
        separator = getattr(config, "sep_token_id", None)
        separator = separator if separator is not None else getattr(config, "eos_token_id", None)
        if separator is None:
            raise ValueError(
                f"{class_name} marks the question as global, but its config has no sep_token_id; set "
                "model.config.sep_token_id = tokenizer.sep_token_id, or pass global_attention_mask"
            )
        end = (ids == separator).int().argmax(1, keepdim=True)
        at = torch.arange(ids.shape[1], device=ids.device)[None, :]
        is_question = at < end.clamp(min=1)
        if attention_mask is not None:
            is_question = is_question & (attention_mask != 0)
        return is_question
    return None
