"""Sparse attention for Hugging Face Transformers: importing this package registers it."""

from hf_sparse.attention import sparse_attention
from hf_sparse.errors import ConversionError, HfSparseError, UnsupportedModelError
from hf_sparse.integration.auto import register_configs
from hf_sparse.integration.register import register_attention
from hf_sparse.integration.sparsify import sparse_config, sparsify_
from hf_sparse.patterns import PATTERNS, by_head, pattern, pattern_from_dict

__version__ = "0.1.0"

register_attention()
register_configs()

__all__ = [
    "PATTERNS",
    "ConversionError",
    "HfSparseError",
    "UnsupportedModelError",
    "by_head",
    "pattern",
    "pattern_from_dict",
    "sparse_attention",
    "sparse_config",
    "sparsify_",
]
