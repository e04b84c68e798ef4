"""Time the patterns beside dense attention and their peers; installed and imported as ``hf_sparse.benchmarks``."""

if __name__ != "hf_sparse.benchmarks":
    raise ImportError(f"this folder is not the package {__name__!r}: install hf-sparse and import hf_sparse.benchmarks")
