"""A checkpoint's own sliding window: which layers have one, and which patterns stay inside it."""

from typing import Any

from hf_sparse.parts import BlockWindow, Globals, Part, Scope, Window
from hf_sparse.patterns import Pattern, parts_of


def window_of(config: Any, layer: int, *, is_causal: bool) -> int | None:
    """Return the sliding window of a layer; None where it has none.

    A window of w reads what is less than w tokens away: w keys, the query's own included, where the layer is causal, and
    2 w - 1 where it is not. transformers' ``sliding_window`` is w of a causal layer, and w - 1 of another (ModernBERT).

    Args:
        config: a text model's config.
        layer: index of the layer, at least 0.
        is_causal: whether the layer reads only what comes before.
    """
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and kinds[layer] != "sliding_attention"):
        return None
    return int(window) if is_causal else int(window) + 1


def windowed_layers(config: Any) -> tuple[int, ...]:
    """Return the layers that have a sliding window, in a model where others have none; no layer where all are alike."""
    kinds = list(getattr(config, "layer_types", None) or ())
    if set(kinds) - {"sliding_attention", "full_attention"}:
        # layers without attention have no number among those that a pattern can be named for
        return ()
    found = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
    has_window = getattr(config, "sliding_window", None) is not None
    return found if has_window and len(found) < len(kinds) else ()


def check_window(
    pattern: Pattern, window: int | None, *, is_causal: bool, heads: int, layer: int, length: int, where: str
) -> None:
    """Check that a pattern reads nothing that a model's own sliding window leaves out.

    Args:
        pattern: of the layer.
        window: as ``window_of`` gives it; None where there is none.
        is_causal: whether the layer reads only what comes before.
        heads: query heads.
        layer: index of the layer, at least 0.
        length: keys there are at most, in tokens.
        where: what the error calls the layer.

    Raises:
        ValueError: if it does; says what to do.
    """
    if window is None or length <= window:
        return
    reach = reach_of(pattern, is_causal=is_causal, heads=heads, layer=layer, length=length)
    if reach is not None and reach < window:
        return
    keys = (
        f"{reach + 1} keys back, its own included" if reach is not None and is_causal else f"keys {reach} tokens away"
    )
    said = "without end" if reach is None else keys
    raise ValueError(
        f"{where} has a sliding window of {window} tokens of its own, and pattern {pattern.key!r} reads {said}; give the layer "
        f"a pattern inside of it (hf_sparse.pattern('band', radius={window - 1}) reads what the dense layer does) or 'dense', "
        'or set "sliding_window": null in the config.json of a copy of the checkpoint to let the pattern take its place'
    )


def reach_of(pattern: Pattern, *, is_causal: bool, heads: int, layer: int, length: int) -> int | None:
    """Return how many tokens from a query its farthest key may stand; None where there is no bound.

    Global tokens that a call marks are not counted.
    """
    if pattern.is_content_based or pattern.has_nodes:
        return None
    reaches = [_reach(part, is_causal) for part in parts_of(pattern, Scope(length, heads, layer, is_causal=is_causal))]
    bounds = [reach for reach in reaches if reach is not None]
    return max(bounds, default=0) if len(bounds) == len(reaches) else None


def _reach(part: Part, is_causal: bool) -> int | None:
    if isinstance(part, Window):
        sides = (part.before,) if is_causal else (part.before, part.after)
        return None if None in sides else max(side for side in sides if side is not None) * part.dilation
    if isinstance(part, BlockWindow):
        return (part.before if is_causal else max(part.before, part.after)) + part.block - 1
    # those that a call marks are checked where they are marked
    is_unmarked = isinstance(part, Globals) and part.is_replaceable and not part.positions
    return 0 if is_unmarked else None
