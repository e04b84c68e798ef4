"""Longer tables of learned positions."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.rotary import longer_rotary
from hf_sparse.integration.support import FAMILIES, Family
from hf_sparse.integration.vision import (
    VisionFamily,
    check_image_size,
    image_pixels,
    interpolate_positions,
    vision_grid,
)


def family_of(config: Any) -> Family | VisionFamily:
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


def limits(config: Any) -> dict[str, Any]:
    """Return what says how long the inputs of a model may be, under the name that config.json has for it."""
    if isinstance(family_of(config), VisionFamily):
        return {"image_size": config.image_size}
    longest = {length_field(config): config.max_position_embeddings}
    return longest if family_of(config).positions else {**longest, "rope_parameters": config.rope_parameters}


def length_field(config: Any) -> str:
    """Return what a config of text calls the length of its positions: GPT-2 says ``n_positions``."""
    return str(config.attribute_map.get("max_position_embeddings", "max_position_embeddings"))


def wanted_limits(
    config: Any,
    *,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
) -> dict[str, Any]:
    """Return the fields with which a config's model reads inputs as long as wanted; none where nothing is wanted.

    Args:
        config: a dense config.
        max_length: tokens of the longest text.
        image_size: pixels of the largest image, or its height and width.
        positions: how rotary positions serve a longer text; see ``longer_rotary``.

    Raises:
        TypeError: if what is wanted is no whole number.
        ValueError: if a length is wanted of a model that reads images or a size of one that reads text, or it is below
            what the config serves already, or ``positions`` does not fit.
    """
    if positions is not None:
        _check_rotary(config, positions, max_length)
    if max_length is None and image_size is None:
        return {}
    family = family_of(config)
    if isinstance(family, VisionFamily):
        if max_length is not None:
            raise ValueError(f"{config.model_type} reads images: give image_size, in pixels, and leave max_length out")
        return {"image_size": check_image_size(config, image_size)}
    if image_size is not None:
        raise ValueError(f"{config.model_type} reads text: give max_length, in tokens, and leave image_size out")
    limit = _wanted_limit(config, family, max_length)
    return {length_field(config): limit} if family.positions else longer_rotary(config, limit, positions)


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


def longer_table(table: Tensor, before: Any, after: Any) -> Tensor:
    """Return a position table for longer inputs: tiled for text, interpolated for images.

    Args:
        table: ``[P, D]`` of any type for text, float ``[1, P, D]`` for images.
        before: the config it was learned with.
        after: the config that it is to fit.
    """
    family = family_of(before)
    if isinstance(family, VisionFamily):
        return interpolate_positions(table, before, after)
    return tile_positions(table, family.rows(after), offset=family.offset(before))


def lengthen_(model: Any, wanted: Any) -> None:
    """Lengthen the position table of a model in place, with what was built to its size and with its config.

    Args:
        model: a transformers model of a known family.
        wanted: its config with a longer limit.
    """
    family = family_of(model.config)
    for name, parameter in list(model.named_parameters()):
        if not name.endswith(family.positions):
            continue
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        table = longer_table(parameter.detach(), model.config, wanted)
        setattr(owner, leaf, nn.Parameter(table, requires_grad=parameter.requires_grad))
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = len(table)
    if isinstance(family, VisionFamily):
        _fit_images_(model, wanted)
    else:
        _fit_buffers_(model, wanted.max_position_embeddings)
    for field, value in limits(wanted).items():
        setattr(model.config, field, value)


def _fit_buffers_(model: nn.Module, rows: int) -> None:
    for module in model.modules():
        for buffer in ("position_ids", "token_type_ids"):
            old = module._buffers.get(buffer)
            if old is not None:
                new = torch.arange(rows, device=old.device) if buffer == "position_ids" else old.new_zeros(rows)
                module._buffers[buffer] = new.expand(1, -1).clone()


def _fit_images_(model: nn.Module, wanted: Any) -> None:
    """Let the embeddings expect larger images: they keep the size that they were built for."""
    _, height, width = vision_grid(wanted)
    fitting = {"image_size": image_pixels(wanted), "num_patches": height * width}
    for module in model.modules():
        for name, value in fitting.items():
            if hasattr(module, name):
                setattr(module, name, value)


def _check_rotary(config: Any, positions: str, max_length: int | None) -> None:
    """Refuse a way to lengthen rotary positions where there are none, or no length."""
    if family_of(config).positions:
        raise ValueError(
            f"positions={positions!r} is for models with rotary positions, and {config.model_type} has a table; leave it out"
        )
    if max_length is None:
        raise ValueError(f"positions={positions!r} says how to reach a longer text: give max_length as well")


def _wanted_limit(config: Any, family: Family, max_length: Any) -> int:
    """Return what ``max_position_embeddings`` has to say for a length."""
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if max_length < family.length(config):
        raise ValueError(
            f"max_length {max_length} is shorter than the {family.length(config)} tokens this checkpoint reads already"
        )
    return family.limit(config, max_length)
