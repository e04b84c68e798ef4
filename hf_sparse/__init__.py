"""Sparse attention for Hugging Face Transformers: importing this package registers it."""

from hf_sparse.attention import sparse_attention
from hf_sparse.patterns import PATTERNS, by_head, pattern, pattern_from_dict

__version__ = "0.1.0"

__all__ = ["PATTERNS", "by_head", "pattern", "pattern_from_dict", "sparse_attention"]
