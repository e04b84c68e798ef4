"""Models that read images: their grid of patches, and learned positions for larger images."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.entry import Entry


@dataclass(frozen=True)
class VisionFamily:
    """How one model type that reads images stores its learned positions.

    Attributes:
        positions: how the name of the position table ends; float ``[1, P, D]`` or ``[P, D]``, P being ``prefix_rows``
            and the patches.
        prefix_rows: rows of the table before those of the patches (CLS, distillation token).
        is_square: whether the model takes its table for that of a square image whatever its config says.
        is_antialiased: whether the model smooths its positions before it interpolates them.
    """

    positions: str = "embeddings.position_embeddings"
    prefix_rows: int = 1
    is_square: bool = False
    is_antialiased: bool = False

    def length(self, config: Any) -> int:
        """Return the tokens of an image of the config's size."""
        prefix, height, width = vision_grid(config)
        return prefix + height * width


VISION_FAMILIES: dict[str, VisionFamily] = {
    "beit": VisionFamily(is_square=True),
    "clip_vision_model": VisionFamily("embeddings.position_embedding.weight", is_square=True),
    "deit": VisionFamily(prefix_rows=2),
    "dinov2": VisionFamily(is_square=True),
    "dinov2_with_registers": VisionFamily(is_square=True, is_antialiased=True),
    "vit": VisionFamily(),
}


def vision_family_of(config: Any) -> VisionFamily | None:
    """Return how a config's model type stores positions of patches; None if it reads no images, or is not in the table."""
    return VISION_FAMILIES.get(getattr(config, "dense_model_type", None) or config.model_type)


def vision_grid(config: Any, pixels: tuple[int, int] | None = None) -> tuple[int, int, int]:
    """Return how many tokens come before the patches, and the rows and columns of patches.

    Args:
        config: of a model that reads images, dense or sparse.
        pixels: height and width of the image; None takes the config's ``image_size``.

    Returns:
        The tokens before the patches (CLS, distillation token, registers), the grid's height and its width, in patches.

    Raises:
        UnsupportedModelError: if the model type is not in the table.
    """
    family = vision_family_of(config)
    if family is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no known grid of patches; known: {', '.join(sorted(VISION_FAMILIES))}"
        )
    (height, width), (rows, columns) = pixels or image_pixels(config), _pair(config.patch_size)
    return family.prefix_rows + getattr(config, "num_register_tokens", 0), height // rows, width // columns


def fitted_entry(entry: Entry, config: Any) -> Entry:
    """Return an entry with what its patterns leave open about the grid of a model that reads images.

    Raises:
        ValueError: if a pattern is for another grid.
    """
    return entry if vision_family_of(config) is None else entry.on_grid(*vision_grid(config))


def image_pixels(config: Any) -> tuple[int, int]:
    """Return the height and width of the images that a config is for, in pixels."""
    return _pair(config.image_size)


def check_image_size(config: Any, image_size: Any) -> int | list[int]:
    """Return an image size in the form of ``config.image_size``.

    Args:
        config: of a model that reads images.
        image_size: pixels, or height and width; at least the present ones.

    Raises:
        TypeError: if it is neither.
        ValueError: if images of that size cannot be read.
    """
    pair = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(pair) != 2 or any(isinstance(pixels, bool) or not isinstance(pixels, int) for pixels in pair):
        raise TypeError(f"image_size must be pixels, a whole number or (height, width); got {image_size!r}")
    before, patch, family = image_pixels(config), _pair(config.patch_size), vision_family_of(config)
    wanted = f"image_size {_said(pair)}"
    if pair[0] < before[0] or pair[1] < before[1]:
        raise ValueError(f"{wanted} is smaller than the {_said(before)} pixels this checkpoint reads already")
    if pair != before:
        if pair[0] % patch[0] or pair[1] % patch[1]:
            raise ValueError(f"{wanted} must be a multiple of the patches of {_said(patch)} pixels")
        if family is not None and family.is_square and pair[0] != pair[1]:
            raise ValueError(f"{wanted} must be square: {config.model_type} takes its positions for those of a square")
        _, height, width = vision_grid(config)
        if height != width:
            raise ValueError(
                f"{wanted}: positions are interpolated from a square grid only, as in transformers, and this checkpoint's is "
                f"{_said((height, width))} patches; leave image_size out"
            )
    return pair[0] if pair[0] == pair[1] else list(pair)


def interpolate_positions(table: Tensor, before: Any, after: Any) -> Tensor:
    """Return the positions of the patches of larger images, as the model's own ``interpolate_pos_encoding`` would.

    Always in float32, where ViT, DeiT and BEiT themselves interpolate half precision in half precision.

    Args:
        table: float ``[1, P, D]`` or ``[P, D]``, the learned table.
        before: the config it was learned with.
        after: the same with a larger ``image_size``.
    """
    family = VISION_FAMILIES[getattr(before, "dense_model_type", None) or before.model_type]
    rows = table.view(1, -1, table.shape[-1])
    prefix, patches = rows[:, : family.prefix_rows], rows[:, family.prefix_rows :]
    (_, *grid), (_, *larger) = vision_grid(before), vision_grid(after)
    image = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)
    image = nn.functional.interpolate(
        image.to(torch.float32), size=larger, mode="bicubic", align_corners=False, antialias=family.is_antialiased
    )
    larger_rows = torch.cat([prefix, image.permute(0, 2, 3, 1).reshape(1, -1, table.shape[-1]).to(table.dtype)], dim=1)
    return larger_rows.view(-1, table.shape[-1]) if table.dim() == 2 else larger_rows


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _said(pair: tuple[int, ...]) -> str:
    return " x ".join(map(str, pair))
