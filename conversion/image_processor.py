"""The size that an image processor brings images to."""

from typing import Any

from transformers.models.auto import image_processing_auto


def raise_image_size(held: dict[str, Any], pixels: tuple[int, int]) -> None:
    """Let an image processor make larger images.

    What comes out gets the new size. Where that is cropped out of a larger one, the larger one grows in proportion.

    Args:
        held: what preprocessor_config.json holds; changed in place.
        pixels: height and width wanted.
    """
    is_cropped = "crop_size" in held and held.get("do_center_crop", True)
    before = _pair(held["crop_size"] if is_cropped else held.get("size"))
    if before is None:
        return
    factors = (pixels[0] / before[0], pixels[1] / before[1])
    if "size" in held:
        held["size"] = _grown(held["size"], factors)
    if "crop_size" in held:
        held["crop_size"] = _exactly(held["crop_size"], pixels)


def name_image_processor(held: dict[str, Any], model_type: str) -> None:
    """Name the class of an image processor, which transformers would else look up by the model type."""
    if held.get("image_processor_type") or held.get("feature_extractor_type"):
        return
    known: Any = vars(image_processing_auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
    name = known.get(model_type, {}).get("torchvision")
    if name is not None:
        held["image_processor_type"] = name


def _pair(size: Any) -> tuple[int, int] | None:
    """Return the height and width that a size stands for; None where it is in no known form."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return None


def _exactly(size: Any, pixels: tuple[int, int]) -> Any:
    """Return a size in pixels, as a number where it was one and can stay one."""
    if isinstance(size, int) and pixels[0] == pixels[1]:
        return pixels[0]
    return {"height": pixels[0], "width": pixels[1]}


def _grown(size: Any, factors: tuple[float, float]) -> Any:
    """Return a size multiplied; a length that serves both sides by the larger factor."""
    if isinstance(size, dict):
        by = {"height": factors[0], "width": factors[1]}
        return {key: round(value * by.get(key, max(factors))) for key, value in size.items()}
    if isinstance(size, int) and factors[0] == factors[1]:
        return round(size * factors[0])
    pair = _pair(size)
    if pair is None:
        return size
    return {"height": round(pair[0] * factors[0]), "width": round(pair[1] * factors[1])}
