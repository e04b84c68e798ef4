"""A checkpoint's own sliding window: which layers have one, and which patterns stay inside it."""

from typing import Any

from hf_sparse.parts import BlockWindow, Globals, Part, Scope, Window
from hf_sparse.patterns import Pattern, parts_of


def window_of(config: Any, layer: int) -> int | None:
    """Return the sliding window of a layer: keys a query reads at most, its own included; None where it has none.

    Args:
        config: a text model's config.
        layer: index of the layer, at least 0.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return int(window)


def check_window(pattern: Pattern, window: int | None, *, heads: int, layer: int, length: int, where: str) -> None:
    """Check that a pattern reads nothing that a causal model's own sliding window leaves out.

    Args:
        pattern: of the layer.
        window: keys a query reads at most, its own included; None where there is no window.
        heads: query heads.
        layer: index of the layer, at least 0.
        length: keys there are at most, in tokens.
        where: what the error calls the layer.

    Raises:
        ValueError: if it does; says what to do.
    """
    if window is None or length <= window:
        return
    reach = causal_reach(pattern, heads=heads, layer=layer, length=length)
    if reach is not None and reach < window:
        return
    said = "without end" if reach is None else f"{reach + 1} keys back, its own included"
    raise ValueError(
        f"{where} has a sliding window of {window} tokens of its own, and pattern {pattern.key!r} reads {said}; give the layer "
        f"a pattern inside of it (hf_sparse.pattern('band', radius={window - 1}) reads what the dense layer does) or 'dense', "
        'or set "sliding_window": null in the config.json of a copy of the checkpoint to let the pattern take its place'
    )


def causal_reach(pattern: Pattern, *, heads: int, layer: int, length: int) -> int | None:
    """Return how many tokens before a query its farthest key may stand in a causal layer; None where there is no bound.

    Global tokens that a call marks are not counted.
    """
    if pattern.is_content_based or pattern.has_nodes:
        return None
    reaches = [_reach(part) for part in parts_of(pattern, Scope(length, heads, layer, is_causal=True))]
    bounds = [reach for reach in reaches if reach is not None]
    return max(bounds, default=0) if len(bounds) == len(reaches) else None


def _reach(part: Part) -> int | None:
    if isinstance(part, Window):
        return None if part.before is None else part.before * part.dilation
    if isinstance(part, BlockWindow):
        return part.before + part.block - 1
    # those that a call marks are checked where they are marked
    is_unmarked = isinstance(part, Globals) and part.is_replaceable and not part.positions
    return 0 if is_unmarked else None
