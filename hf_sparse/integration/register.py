"""Registration of our names with transformers' attention and mask interfaces."""

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface

from hf_sparse.integration.attention import NamedPattern, attend
from hf_sparse.integration.layers import NAME
from hf_sparse.integration.mask import sparse_mask
from hf_sparse.patterns import PATTERNS


def register_attention() -> None:
    """Register ``hf_sparse`` and ``hf_sparse:<key>`` for every pattern, attention and mask function together.

    Raises:
        RuntimeError: if another package holds one of the names.
    """
    _register(NAME, attend)
    for key, cls in PATTERNS.items():
        _register(f"{NAME}:{key}", NamedPattern(cls()))


def _register(name: str, function: Callable[..., Any]) -> None:
    for interface, ours in ((AttentionInterface, function), (AttentionMaskInterface, sparse_mask)):
        held = interface._global_mapping.get(name)
        owner = getattr(held, "__module__", "")
        if held is not None and not owner.startswith("hf_sparse."):
            raise RuntimeError(f"the attention name {name!r} is held by {owner}; hf_sparse does not take it over")
        interface.register(name, ours)
