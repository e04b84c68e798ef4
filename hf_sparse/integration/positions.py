"""Longer inputs: what a config and its tables of positions become."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.integration.families import FAMILIES, Family, family_of
from hf_sparse.integration.rotary import METHODS, longer_rotary
from hf_sparse.integration.vision import (
    VisionFamily,
    check_image_size,
    image_pixels,
    interpolate_positions,
    vision_grid,
)

# how a learned table becomes longer, the first where nothing is said; under this name in a config that says it
TABLE_METHODS = ("tile", "interpolate")
METHOD_FIELD = "sparse_positions"


def limits(config: Any) -> dict[str, Any]:
    """Return what says how long the inputs of a model may be, under the names that config.json has for it."""
    family = family_of(config)
    if isinstance(family, VisionFamily):
        return {"image_size": config.image_size}
    if family.kind == "buckets":
        return {family.field: family.length(config)}
    longest = {length_field(config): getattr(config, family.field)}
    return {**longest, "rope_parameters": config.rope_parameters} if family.kind == "rotary" else longest


def length_field(config: Any) -> str:
    """Return what a config of text calls the length of its positions: GPT-2 says ``n_positions``."""
    field = getattr(family_of(config), "field", "max_position_embeddings")
    return str(config.attribute_map.get(field, field))


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
        positions: how positions serve a longer text: one of ``TABLE_METHODS`` where they are a learned table, and of the
            methods of ``longer_rotary`` where they are rotary; None takes the first of them.

    Raises:
        TypeError: if what is wanted is no whole number.
        ValueError: if a length is wanted of a model that reads images or a size of one that reads text, or it is below
            what the config serves already, or ``positions`` does not fit.
    """
    if positions is not None:
        _check_method(config, positions, max_length)
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
    if family.kind == "rotary":
        return longer_rotary(config, limit, positions)
    fields: dict[str, Any] = {length_field(config): limit}
    return fields if positions in (None, "tile") else {**fields, METHOD_FIELD: positions}


def tile_positions(table: Tensor, rows: int, *, offset: int) -> Tensor:
    """Return a longer position table in which the learned rows repeat.

    Args:
        table: ``[P, D]``, the learned table.
        rows: rows wanted, at least ``P``.
        offset: rows at the start that belong to no position; kept once.

    Source: Beltagy et al. 2020, arXiv:2004.05150, section 5 ("copying the 512 position embeddings multiple times").
    """
    learned = table[offset:]
    repeats = -(-(rows - offset) // len(learned))
    return torch.cat([table[:offset], learned.repeat(repeats, 1)[: rows - offset]])


def stretch_positions(table: Tensor, rows: int, *, offset: int) -> Tensor:
    """Return a longer position table between whose first and last learned rows the others are interpolated, in float32.

    Args:
        table: float ``[P, D]``, the learned table.
        rows: rows wanted, at least ``P``.
        offset: rows at the start that belong to no position; kept as they are.

    Source: Chen et al. 2023, arXiv:2306.15595, section 2.3, on rotary positions; here of a table, whose ends stay.
    """
    learned = table[offset:].to(torch.float32).t()[None]
    stretched = nn.functional.interpolate(learned, size=rows - offset, mode="linear", align_corners=True)
    return torch.cat([table[:offset], stretched[0].t().to(table.dtype)])


def continue_sinusoids(table: Tensor, rows: int) -> Tensor:
    """Return a longer table of sines and cosines (Pegasus, Marian): the rows it has, and those that come after.

    Args:
        table: float ``[P, D]``.
        rows: rows wanted, at least ``P``.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; the sines in the first half, as transformers has it.
    """
    width = table.shape[1]
    position = torch.arange(len(table), rows, dtype=torch.float64)[:, None]
    angle = position / 10000 ** (2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    more = torch.cat([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=1)
    return torch.cat([table, more.to(table.device, torch.float32).to(table.dtype)])


def only_moves_rows(config: Any) -> bool:
    """Say whether a longer table of positions is made of rows of the shorter one, and no number changes."""
    family = family_of(config)
    return isinstance(family, Family) and family.kind == "learned" and not hasattr(config, METHOD_FIELD)


def longer_table(table: Tensor, before: Any, after: Any) -> Tensor:
    """Return a position table for longer inputs.

    Args:
        table: ``[P, D]`` of any type where rows only move, else float; float ``[1, P, D]`` or ``[P, D]`` for images.
        before: the config it was learned with.
        after: the config that it is to fit.
    """
    family = family_of(before)
    if isinstance(family, VisionFamily):
        return interpolate_positions(table, before, after)
    rows = family.rows(after)
    if family.kind == "sinusoidal":
        return continue_sinusoids(table, rows)
    lengthen = tile_positions if only_moves_rows(after) else stretch_positions
    return lengthen(table, rows, offset=family.offset(before))


def lengthen_(model: Any, wanted: Any) -> None:
    """Lengthen the position table of a model in place, with what was built to its size and with its config.

    Args:
        model: a transformers model of a family with tables.
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
    prefix, height, width = vision_grid(wanted)
    tokens = prefix + height * width
    fitting = {"image_size": image_pixels(wanted), "num_patches": height * width, "num_positions": tokens}
    _fit_buffers_(model, tokens)
    for module in model.modules():
        for name, value in fitting.items():
            if hasattr(module, name):
                setattr(module, name, value)


def _check_method(config: Any, positions: str, max_length: int | None) -> None:
    """Refuse a way to lengthen positions that are not of its kind, or that no length asks for."""
    family = family_of(config)
    kind = "images" if isinstance(family, VisionFamily) else family.kind
    known = {"learned": TABLE_METHODS, "rotary": METHODS}.get(kind)
    if known is None:
        why = {
            "images": "interpolates them, as the model itself does",
            "sinusoidal": "continues its table of sines",
            "buckets": "has a bias by distance, which has no end",
            "fixed": "keeps its length",
        }
        raise ValueError(
            f"positions={positions!r} has nothing to choose: {config.model_type} {why[kind]}; leave it out"
        )
    if positions not in known:
        what = "a learned table of positions" if kind == "learned" else "rotary positions"
        raise ValueError(
            f"positions must be one of {', '.join(known)} for {config.model_type}, which has {what}; got {positions!r}"
        )
    if max_length is None:
        raise ValueError(f"positions={positions!r} says how to reach a longer text: give max_length as well")


def _wanted_limit(config: Any, family: Family, max_length: Any) -> int:
    """Return what the config has to say for a length."""
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise TypeError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if max_length < family.length(config):
        raise ValueError(
            f"max_length {max_length} is shorter than the {family.length(config)} tokens this checkpoint reads already"
        )
    if family.kind == "fixed" and max_length > family.length(config):
        why = (
            "its input has one length"
            if (getattr(config, "dense_model_type", None) or config.model_type) in FAMILIES
            else "how it stores positions is not in the table of families, so they cannot be lengthened"
        )
        raise ValueError(
            f"{config.model_type} keeps its length of {family.length(config)} tokens: {why}; leave max_length out"
        )
    return family.limit(config, max_length)
