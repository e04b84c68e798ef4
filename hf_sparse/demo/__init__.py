"""The demo: a real dense checkpoint made sparse, reading real long documents, against what people do today."""

from hf_sparse.demo.report import run

__all__ = ["run"]
