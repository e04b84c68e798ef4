"""The ``sparse_attention`` entry of a config: which pattern serves which layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_sparse.patterns import Pattern, pattern_from_dict

ENTRY_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """A pattern for all layers, and exceptions.

    Attributes:
        pattern: serves every layer that is not named in ``layers``.
        layers: maps "3", "encoder.3" or "decoder.3" to a pattern, or to None for a layer that stays dense.
    """

    pattern: Pattern
    layers: tuple[tuple[str, Pattern | None], ...] = ()

    def pattern_of(self, stack: str, index: int) -> Pattern | None:
        """Return the pattern of a layer; None where it stays dense.

        Args:
            stack: "encoder" or "decoder" in a model that has both, else "".
            index: of the layer in its stack.
        """
        key = f"{stack}.{index}" if stack else str(index)
        return dict(self.layers).get(key, self.pattern)

    def of_stack(self, stack: str) -> "Entry":
        """Return the entry for one stack of an encoder-decoder that stands alone, as in ``BartForCausalLM``."""
        other = {"encoder": "decoder.", "decoder": "encoder."}[stack]
        held = [(key.removeprefix(f"{stack}."), pattern) for key, pattern in self.layers if not key.startswith(other)]
        return Entry(self.pattern, tuple(held))

    def on_grid(self, prefix: int, height: int, width: int) -> "Entry":
        """Return the entry for a model that reads images: its patterns as ``Pattern.on_grid`` gives them."""
        layers = tuple((key, pattern and pattern.on_grid(prefix, height, width)) for key, pattern in self.layers)
        return Entry(self.pattern.on_grid(prefix, height, width), layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as it stands in config.json."""
        layers = {key: "dense" if pattern is None else pattern.to_dict() for key, pattern in self.layers}
        return {"version": ENTRY_VERSION, "pattern": self.pattern.to_dict(), "layers": layers}


def make_entry(pattern: Pattern, layers: Mapping[int | str, Pattern | str] | None = None) -> Entry:
    """Make an entry.

    Args:
        pattern: serves every layer not named in ``layers``.
        layers: maps a layer ("3", "encoder.3", "decoder.3" or a number) to a pattern or to "dense".

    Raises:
        TypeError: if a value is neither a pattern nor "dense".
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a pattern such as hf_sparse.pattern('band'), got {pattern!r}")
    if not isinstance(layers or {}, Mapping):
        raise TypeError(f"layers maps layers to patterns, such as {{0: 'dense'}}; got {layers!r}")
    named: list[tuple[str, Pattern | None]] = []
    for key, value in (layers or {}).items():
        if not isinstance(value, Pattern) and value != "dense":
            raise TypeError(f"layers[{key!r}] must be a pattern or 'dense', got {value!r}")
        if str(key) in dict(named):
            raise ValueError(f"layers names layer {str(key)!r} twice")
        named.append((str(key), value if isinstance(value, Pattern) else None))
    return Entry(pattern, tuple(named))


def read_entry(config: Any) -> Entry:
    """Return the entry of a config.

    Raises:
        ValueError: if there is none, or a later version of this package wrote it.
    """
    raw = getattr(config, "sparse_attention", None)
    if raw is None:
        raise ValueError(
            f"{type(config).__name__} holds no sparse_attention entry, so there is no pattern to follow; "
            "make one with hf_sparse.sparse_config(source, pattern), hf_sparse.sparsify_(model, pattern) or hf-sparse convert"
        )
    if not isinstance(raw, dict) or "pattern" not in raw:
        raise ValueError(f"sparse_attention must be a dict with version, pattern and layers; got {raw!r}")
    if raw.get("version") != ENTRY_VERSION:
        raise ValueError(
            f"sparse_attention has version {raw.get('version')!r}, this hf_sparse reads {ENTRY_VERSION}; "
            "update with pip install -U hf-sparse"
        )
    layers = tuple(
        (key, None if value == "dense" else pattern_from_dict(value)) for key, value in raw.get("layers", {}).items()
    )
    return Entry(pattern_from_dict(raw["pattern"]), layers)
