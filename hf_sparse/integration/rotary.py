"""Longer inputs for rotary positions, which have no table: what a config says instead."""

import copy
from collections.abc import Iterator
from typing import Any

from hf_sparse.errors import UnsupportedModelError

METHODS = ("none", "linear", "ntk", "yarn", "dynamic")
# types that scale by the length they were trained on, and derive what a config leaves open from the longest input
_DERIVING = ("yarn", "longrope")


def rotary_length(config: Any) -> int:
    """Return the longest input that rotary positions serve, in tokens: those that follow the input name a factor."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    factors = [held["factor"] for held in _sorts(parameters) if held.get("rope_type") == "dynamic"]
    return int(config.max_position_embeddings * max(factors, default=1))


def longer_rotary(config: Any, max_length: int, method: str | None) -> dict[str, Any]:
    """Return the fields of a config with which its rotary positions serve longer inputs.

    Where layers have rotary positions of several sorts (ModernBERT, Gemma 3), those of layers with a sliding window stay as
    they are: nothing there is farther away than it was.

    Args:
        config: of a model with rotary positions; not changed.
        max_length: tokens of the longest text, at least those that the config serves.
        method: "none" (or None) leaves positions as they are: what a local pattern reads is then no farther away than in
            training. "linear" squeezes positions, "ntk" raises the base once, so that keys in a cache stay valid,
            "yarn" squeezes slow frequencies alone, and "dynamic" raises the base with the longest text so far: short texts stay
            as they were, and keys in a cache are older than the base that reads them.

    Returns:
        ``max_position_embeddings`` and ``rope_parameters``, with everything in it that transformers would else derive from
        the former. It stays for "dynamic", which scales beyond it.

    Raises:
        ValueError: if the method is unknown or does not fit the checkpoint.
        UnsupportedModelError: if the sorts of rotary positions have names that are unknown here.

    Source: "linear" Chen et al. 2023, arXiv:2306.15595; the others Peng et al. 2023, arXiv:2309.00071, sections 3.1 to
    3.4.
    """
    method = "none" if method is None else method
    if method not in METHODS:
        raise ValueError(f"positions must be one of {', '.join(METHODS)}; got {method!r}")
    before, held = int(config.max_position_embeddings), copy.deepcopy(config.rope_parameters)
    far = held if "rope_type" in held else held.get("full_attention")
    if far is None and "full_attention" not in held:
        raise UnsupportedModelError(
            f"{config.model_type} has rotary positions of several sorts ({', '.join(held)}), which cannot be lengthened yet"
        )
    fields = {"max_position_embeddings": max_length, "rope_parameters": held}
    if max_length == before:
        return fields
    for sort in _sorts(held):
        _keep(sort, before)
    if method == "none":
        return fields
    if far is None:
        raise ValueError(
            f"positions={method!r} has nothing to scale: layers that read far have none; give positions='none'"
        )
    kind, factor = far["rope_type"], max_length / before
    if kind != "default":
        raise ValueError(
            f"positions={method!r} scales rotary positions, and those of this checkpoint are scaled already (rope_type "
            f"{kind!r}); give positions='none', which leaves them as they are"
        )
    if method == "ntk":
        far["rope_theta"] = _raised_base(config, far, factor)
        return fields
    far.update({"rope_type": method, "factor": factor})
    if method == "yarn":
        far["original_max_position_embeddings"] = before
    return {**fields, "max_position_embeddings": before} if method == "dynamic" else fields


def _sorts(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parameters of each sort of rotary positions."""
    if "rope_type" in parameters:
        yield parameters
    else:
        yield from (held for held in parameters.values() if isinstance(held, dict))


def _keep(held: dict[str, Any], before: int) -> None:
    """Write down what would change with the longest input."""
    kind = held.get("rope_type")
    if kind == "dynamic":
        raise ValueError(
            "rotary positions of rope_type 'dynamic' are scaled by max_position_embeddings, so that a longer one would change "
            "what the model says of short texts; leave max_length out: its positions stretch by themselves"
        )
    if kind in _DERIVING and held.get("factor") is None:
        held["factor"] = before / held["original_max_position_embeddings"]


def _raised_base(config: Any, held: dict[str, Any], factor: float) -> float:
    """Return the base under which the slowest frequency turns as far on the longer input as it did on the shorter."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = int(width * held.get("partial_rotary_factor", 1.0))
    if turned <= 2:
        raise ValueError(f"positions='ntk' needs at least 4 rotary dimensions a head, and this model has {turned}")
    return float(held["rope_theta"] * factor ** (turned / (turned - 2)))
