"""Longer tables of learned positions."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.support import FAMILIES, Family


def family_of(config: Any) -> Family:
    """Return how a config's model type stores positions; sparse types count as the dense type they came from.

    Raises:
        UnsupportedModelError: if the type is not in the table.
    """
    model_type = getattr(config, "dense_model_type", None) or config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} cannot be converted or lengthened yet; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def tile_positions(table: Tensor, rows: int, *, offset: int) -> Tensor:
    """Return a longer position table in which the learned rows repeat.

    Args:
        table: float ``[P, D]``, the learned table.
        rows: rows wanted, at least ``P``.
        offset: rows at the start that belong to no position; kept once.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 5 ("copying the 512 position embeddings multiple times").
    """
    learned = table[offset:]
    repeats = -(-(rows - offset) // len(learned))
    return torch.cat([table[:offset], learned.repeat(repeats, 1)[: rows - offset]])


def lengthen_(model: Any, max_length: int) -> None:
    """Tile the position table of a model in place, with its buffers and its config.

    Args:
        model: a transformers model of a known family.
        max_length: tokens of the longest input wanted; at least the present one.

    Raises:
        ValueError: if it is shorter.
    """
    family = family_of(model.config)
    rows = check_max_length(model.config, max_length)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and f"{name}.weight".endswith(family.positions):
            table = tile_positions(module.weight.detach(), rows, offset=family.offset(model.config))
            module.weight = nn.Parameter(table, requires_grad=module.weight.requires_grad)
            module.num_embeddings = rows
    for module in model.modules():
        for buffer in ("position_ids", "token_type_ids"):
            old = module._buffers.get(buffer)
            if old is not None:
                new = torch.arange(rows, device=old.device) if buffer == "position_ids" else old.new_zeros(rows)
                module._buffers[buffer] = new.expand(1, -1).clone()
    model.config.max_position_embeddings = rows


def check_max_length(config: Any, max_length: int) -> int:
    """Return the rows a position table needs for a length.

    Raises:
        ValueError: if the length is below what the config serves already.
    """
    family = family_of(config)
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if max_length < family.length(config):
        raise ValueError(
            f"max_length {max_length} is shorter than the {family.length(config)} tokens this checkpoint reads already"
        )
    return max_length + family.offset(config)
