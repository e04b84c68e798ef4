"""The benchmark from end to end."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging

from hf_sparse.benchmarks.attention import BOTH, DENSE, cells_at, patterns_at, plan_rows, positions_of
from hf_sparse.benchmarks.machine import describe
from hf_sparse.benchmarks.memory import bytes_of_tensors, peak_memory
from hf_sparse.benchmarks.models import Models
from hf_sparse.benchmarks.report import tables, write_readme
from hf_sparse.benchmarks.timing import Cell, time_cells

LENGTHS = {
    ("cpu", "quick"): (1024, 4096),
    ("cpu", "full"): (256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    ("cuda", "quick"): (1024, 4096, 16384),
    ("cuda", "full"): (512, 1024, 4096, 16384, 65536, 131072, 262144, 1048576),
}
# from here on a single run takes long enough to be warm by itself
LONG = {"quick": 4096, "full": 16384}
# from here on each cell runs twice, or a full run would take more than half an hour
LONGEST = 32768


def run(
    *,
    out: Path,
    mode: str,
    device: str,
    only: Sequence[str] = (),
    as_json: bool = False,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Time everything, write ``out/results/<device>-<mode>.json`` and ``out/README.md``, and print the tables.

    A run of some sections alone has their names in that of its file, and stands in for a whole run where there is none.

    Args:
        out: folder to write into; made if it is missing.
        mode: "quick" (under two minutes on two cores) or "full" (under thirty).
        device: "cpu" or "cuda".
        only: sections to run out of "attention", "models" and "memory"; all if empty.
        as_json: print the results as JSON and nothing else on standard output.
        settings: what tests make smaller: "lengths", "model_length", "seconds".

    Returns:
        What is written.

    Raises:
        ValueError: if there is no CUDA device and one was asked for.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none; leave it out to time the CPU")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    is_quick = mode == "quick"
    held: dict[str, Any] = {"lengths": LENGTHS[device, mode], "model_length": 1536 if is_quick else 4096}
    held |= {"seconds": 0.0 if is_quick else 20.0, **(settings or {})}
    sections = tuple(only) or ("attention", "models", "memory")
    console = Console(stderr=as_json)
    command = f"hf-sparse bench --mode {mode} --device {device}" + "".join(f" --only {name}" for name in only)
    result: dict[str, Any] = {"machine": describe(device), "mode": mode, "command": command, "rows": [], "memory": []}
    start = time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        stages = ("attention" in sections) * len(held["lengths"]) + ("models" in sections) + ("memory" in sections)
        task = progress.add_task("", total=stages)

        def tell(stage: str, what: str) -> None:
            progress.update(task, description=f"{stage}: {what}"[:90])

        if "attention" in sections:
            for n in held["lengths"]:
                result["rows"] += plan_rows(n, device)
                result["rows"] += _timed(list(cells_at(n, device, mode)), held, mode, device, f"{n} tokens", tell)
                progress.advance(task)
        if "models" in sections:
            models = Models(held["model_length"], device)
            result["differences"] = models.differences()
            for cells, stage in ((models.cells(), "models"), (models.layer_cells(), "layers")):
                result["rows"] += _timed(list(cells), held, mode, device, stage, tell)
            progress.advance(task)
        if "memory" in sections:
            for name, n in memory_rows(held["lengths"], mode):
                tell("memory", f"{name}, {n} tokens")
                peak = {"name": name, "n": n, "peak": peak_memory(name, n, device)}
                total = positions_of(patterns_at(n).get(name), n)
                result["memory"].append({**peak, "tensors": bytes_of_tensors(total, device)})
            progress.advance(task)
    result["seconds"] = round(time.perf_counter() - start)
    path = out / "results" / ("-".join((device, mode, *only)) + ".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    write_readme(out)
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        console.print("\n".join(tables(result)), markup=False, highlight=False)
        console.print(f"{result['seconds']} s; written to {path} and {out / 'README.md'}")
    return result


def _timed(
    cells: list[Cell],
    held: dict[str, Any],
    mode: str,
    device: str,
    stage: str,
    tell: Callable[[str, str], None],
) -> list[dict[str, Any]]:
    is_attention = cells[0].facts["section"] == "attention"
    # what runs for seconds is warm enough, but for the plans that a first forward makes
    is_long = cells[0].facts["n"] >= LONG[mode] or not (is_attention or mode == "full")

    def is_warm(cell: Cell) -> bool:
        return is_long and (cell.name == DENSE or cell.what == BOTH or bool(cell.facts.get("dropout")))

    fewest = 2 if cells[0].facts["n"] >= LONGEST else 3
    return time_cells(
        cells,
        least=fewest,
        most=fewest if is_long else 21,
        seconds=held["seconds"],
        device=device,
        is_warm=is_warm,
        tell=functools.partial(tell, stage),
    )


def memory_rows(lengths: Sequence[int], mode: str) -> list[tuple[str, int]]:
    """Return what memory is measured of: the two longest lengths (quick: one), and dense attention where it is timed."""
    is_quick = mode == "quick"
    longest = sorted(lengths)[-1:] if is_quick else sorted(lengths)[-2:]
    names = list(patterns_at(longest[-1]))
    # the longest for all, and half of that for two
    rows = [(name, n) for n in longest for name in (names if n == longest[-1] and not is_quick else names[:2])]
    return [(DENSE, max(n for n in lengths if n <= LONG["full"])), *rows]
