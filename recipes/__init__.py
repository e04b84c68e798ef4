"""Training recipes for sparse models; installed and imported as ``hf_sparse.recipes``."""

if __name__ != "hf_sparse.recipes":
    raise ImportError(f"this folder is not the package {__name__!r}: install hf-sparse and import hf_sparse.recipes")
