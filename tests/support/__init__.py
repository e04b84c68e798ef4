"""Oracles written with loops. No file here imports hf_sparse: what shares code with its judge is not judged."""
