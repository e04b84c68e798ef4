"""The command ``bench``."""

from pathlib import Path
from typing import Annotated

import typer

MODES, DEVICES, SECTIONS = ("quick", "full"), ("cpu", "cuda"), ("attention", "models", "memory")


def bench_command(
    mode: Annotated[str, typer.Option("--mode", help="quick: under two minutes on two cores; full: under thirty.")] = (
        "quick"
    ),
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", help="Folder for results/*.json, README.md and the plot.")] = Path(
        "benchmarks"
    ),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="attention, models or memory. May be repeated.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. [default: torch's]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Time every pattern beside dense attention and its peers, in turns, in one run.

    \b
    Example:
      hf-sparse bench --mode full --out my-machine
    """
    for name, value, known in (
        ("--mode", mode, MODES),
        ("--device", device, DEVICES),
        *(("--only", section, SECTIONS) for section in only or ()),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    from importlib.util import find_spec

    for package in ("local_attention", "matplotlib"):
        if find_spec(package) is None:
            raise ValueError(f"hf-sparse bench needs {package.replace('_', '-')}: pip install 'hf-sparse[bench]'")
    import torch

    from hf_sparse.benchmarks.run import run

    if threads is not None:
        torch.set_num_threads(threads)
    run(out=out, mode=mode, device=device, only=tuple(only or ()), as_json=as_json)
