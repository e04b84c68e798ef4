"""The patterns, by key."""

import dataclasses
import functools
import json
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hf_sparse.parts import Part, Scope
from hf_sparse.patterns.axial import Axial, shifted_axial
from hf_sparse.patterns.band import Band
from hf_sparse.patterns.bigbird import BigBird
from hf_sparse.patterns.block_local import BlockLocal
from hf_sparse.patterns.bp_transformer import BPTransformer
from hf_sparse.patterns.combine import ByHead, Union, by_head
from hf_sparse.patterns.dilated import Dilated
from hf_sparse.patterns.etc import ETC
from hf_sparse.patterns.global_tokens import GlobalTokens
from hf_sparse.patterns.image_1d import Image1D
from hf_sparse.patterns.image_2d import Image2D
from hf_sparse.patterns.longformer import Longformer
from hf_sparse.patterns.lsg import LSG
from hf_sparse.patterns.parent import Pattern
from hf_sparse.patterns.random_blocks import RandomBlocks
from hf_sparse.patterns.reformer import Reformer
from hf_sparse.patterns.routing import Routing
from hf_sparse.patterns.sac import SAC
from hf_sparse.patterns.sinkhorn import Sinkhorn
from hf_sparse.patterns.sparse_transformer import SparseTransformer
from hf_sparse.patterns.star import StarTransformer
from hf_sparse.patterns.strided import Strided

PATTERNS: dict[str, type[Pattern]] = {
    cls.key: cls
    for cls in (
        Band,
        Dilated,
        Strided,
        BlockLocal,
        GlobalTokens,
        RandomBlocks,
        Longformer,
        BigBird,
        StarTransformer,
        ETC,
        SparseTransformer,
        BPTransformer,
        Image1D,
        Image2D,
        Axial,
        Routing,
        Reformer,
        Sinkhorn,
        SAC,
        LSG,
    )
}

_COMBINATIONS: dict[str, type[Pattern]] = {"union": Union, "by_head": ByHead}


def pattern(key: str, **fields: Any) -> Pattern:
    """Return a pattern by its key.

    Args:
        key: one of ``PATTERNS``.
        fields: hyper-parameters; those left out have the defaults of the paper.

    Raises:
        ValueError: if the key or a field is unknown, or a value is bad; the known ones are listed.
    """
    if key not in PATTERNS:
        raise ValueError(f"unknown pattern {key!r}; known: {', '.join(sorted(PATTERNS))}")
    return _build(PATTERNS[key], fields)


def pattern_from_dict(d: dict[str, Any]) -> Pattern:
    """Return the pattern that ``to_dict`` described.

    Args:
        d: ``{"key": ..., field: value, ...}``.

    Raises:
        ValueError: if the key or a field is unknown; the known ones are listed.
        TypeError: if ``d`` is not a dict with a key.
    """
    if not isinstance(d, dict) or "key" not in d:
        raise TypeError(f"a pattern is described by a dict with a 'key', got {d!r}")
    fields = {name: _tuples(value) for name, value in d.items() if name != "key"}
    if d["key"] in _COMBINATIONS:
        members = fields.get("patterns")
        if not isinstance(members, tuple):
            raise ValueError(f"a {d['key']} lists its members under 'patterns', got {members!r}")
        fields["patterns"] = tuple(pattern_from_dict(member) for member in members)
        return _build(_COMBINATIONS[d["key"]], fields)
    return pattern(d["key"], **fields)


@functools.lru_cache(maxsize=256)
def pattern_from_json(text: str) -> Pattern:
    """Return the pattern whose ``json`` this is."""
    return pattern_from_dict(json.loads(text))


@functools.lru_cache(maxsize=256)
def parts_of(pattern: Pattern, scope: Scope) -> tuple[Part, ...]:
    """Return ``pattern.parts(scope)``; equal calls get the same objects, whatever device or mode is the default."""
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        return pattern.parts(scope)


def _build(cls: type[Pattern], fields: dict[str, Any]) -> Pattern:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ValueError(f"pattern {cls.key!r} has no field {name!r}; known: {', '.join(known)}")
    return cls(**fields)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


__all__ = [
    "ETC",
    "LSG",
    "PATTERNS",
    "SAC",
    "Axial",
    "BPTransformer",
    "Band",
    "BigBird",
    "BlockLocal",
    "ByHead",
    "Dilated",
    "GlobalTokens",
    "Image1D",
    "Image2D",
    "Longformer",
    "Pattern",
    "RandomBlocks",
    "Reformer",
    "Routing",
    "Sinkhorn",
    "SparseTransformer",
    "StarTransformer",
    "Strided",
    "Union",
    "by_head",
    "parts_of",
    "pattern",
    "pattern_from_dict",
    "pattern_from_json",
    "shifted_axial",
]
