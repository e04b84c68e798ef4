"""Global tokens by task: what a head marks when the caller marks nothing."""

import warnings
from typing import Any

import torch
from torch import Tensor

from hf_sparse.global_rows import names_global_tokens
from hf_sparse.integration.vision import vision_family_of, vision_grid
from hf_sparse.patterns import Pattern

_FIRST_TOKEN_HEADS = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForImageClassification",
)


def default_global_mask(
    class_name: str,
    config: Any,
    patterns: list[Pattern],
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | None:
    """Return the global tokens of a task head, as in the in-tree Longformer.

    Classification marks the first real token (CLS), of images too, and where a distillation token is classified also that;
    extractive question answering marks the question, which is all before the first separator. Other heads mark nothing,
    and neither does one whose pattern names its own tokens.

    Args:
        class_name: of the model.
        config: of the model; question answering reads ``sep_token_id`` or ``eos_token_id``.
        patterns: the patterns of the model's layers.
        input_ids: int64 ``[B, S]`` or ``[B, choices, S]``, or None.
        inputs_embeds: float ``[B, S, hidden_size]`` or with choices, in place of ids, or None.
        pixel_values: float ``[B, channels, height, width]`` of a model that reads images, or None.
        attention_mask: ``[B, S]`` or with choices, nonzero = a real token; other forms tell nothing here.

    Returns:
        bool ``[B, S]`` (choices folded into the batch), or None where there is nothing to mark.

    Raises:
        ValueError: if a question is to be marked and no separator is known.
    """
    if not all(p.has_global_tokens for p in patterns) or any(names_global_tokens(p) for p in patterns) or not patterns:
        return None
    shape = _tokens(config, input_ids, inputs_embeds, pixel_values)
    if shape is None:
        return None
    device = next(x.device for x in (input_ids, inputs_embeds, pixel_values) if x is not None)
    real = torch.ones(shape, dtype=torch.bool, device=device)
    if isinstance(attention_mask, Tensor) and attention_mask.shape == shape:
        real = attention_mask != 0
    real = real.flatten(0, -2)
    if class_name.endswith(_FIRST_TOKEN_HEADS):
        return torch.zeros_like(real).scatter(1, real.int().argmax(1, keepdim=True), True)
    if class_name.endswith("ForImageClassificationWithTeacher"):
        return torch.arange(real.shape[1], device=device).expand_as(real) < 2
    if class_name.endswith("ForQuestionAnswering"):
        if input_ids is None:
            warnings.warn(
                "no token is global: inputs_embeds do not show where the question ends; pass global_attention_mask",
                stacklevel=2,
            )
            return None
        return _is_question(class_name, config, input_ids.flatten(0, -2)) & real
    return None


def _tokens(
    config: Any, input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values: Tensor | None
) -> tuple[int, ...] | None:
    """Return the shape of the tokens of a batch; None where nothing tells it."""
    if input_ids is not None:
        return tuple(input_ids.shape)
    if inputs_embeds is not None:
        return tuple(inputs_embeds.shape[:-1])
    if pixel_values is None or vision_family_of(config) is None:
        return None
    prefix, height, width = vision_grid(config, (pixel_values.shape[2], pixel_values.shape[3]))
    return pixel_values.shape[0], prefix + height * width


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
