"""Other processes that import the core of the package alone: importing all of Transformers takes longer than their work."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPENING = f"""
import sys, types
hf_sparse = types.ModuleType("hf_sparse")
hf_sparse.__path__ = [{str(ROOT / "hf_sparse")!r}]
sys.modules["hf_sparse"] = hf_sparse
from hf_sparse.patterns import pattern_from_dict
from hf_sparse.attention import sparse_attention
"""


def run_in_core(program: str, *arguments: str, lines: str = "", **environment: str) -> list[str]:
    """Run a program that finds ``pattern_from_dict`` and ``sparse_attention`` imported.

    Args:
        program: what to run.
        arguments: become ``sys.argv[1:]``.
        lines: standard input.
        environment: variables to set besides the present ones.

    Returns:
        The lines it printed.
    """
    ran = subprocess.run(
        [sys.executable, "-c", OPENING + program, *arguments],
        input=lines,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()
