"""What a recipe found, as JSON for programs and as a Markdown table for people."""

import json
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import datasets
import evaluate
import tokenizers
import torch
import transformers

import hf_sparse
from hf_sparse.recipes.processes import count_processes

_SAME = " **The test split is the validation split**, on which epochs and thresholds were chosen: this is no held-out result."


def spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval by Student's t; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def surroundings(*, use_cpu: bool) -> dict[str, Any]:
    """Return versions, device, processes, and the commit of this package; None where it is no checkout."""
    use_cpu |= os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or not torch.cuda.is_available()
    packages = (hf_sparse, torch, transformers, accelerate, datasets, tokenizers, evaluate)
    return {
        "versions": {
            **{package.__name__: package.__version__ for package in packages},
            "python": platform.python_version(),
        },
        "device": "cpu" if use_cpu else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "processes": count_processes(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit that this file is of, with "-dirty" behind it where any Python file is another since."""
    git = shutil.which("git")

    def said(*words: str) -> str | None:
        command = [str(git), "-C", str(Path(__file__).resolve().parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # installed, it may lie inside another checkout
    if git is None or said("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = said("rev-parse", "HEAD")
    return f"{commit}-dirty" if said("status", "--porcelain", "--", ":/*.py") else commit


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md.

    Args:
        folder: that holds the runs.
        results: "task", "arguments", "splits" (name to number of documents, None where it is not known), "models" (name to
            "title" and more), "runs": for each model and seed "model", "seed", "metrics", "seconds" of training, "wall_seconds"
            from loading to saving, in its last sitting, "tokens_per_second" (None where nothing was trained) and
            "peak_memory_mib" (None where it is not known).
    """
    held = {**results, **surroundings(use_cpu=results["arguments"]["use_cpu"])}
    (folder / "results.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    seeds = results["arguments"]["seeds"]
    trained = results["splits"]["train"]
    lines = [
        f"# {results['task']}: {results['arguments']['model']}",
        "",
        f"Test split of {results['splits']['test']} documents, trained on {'a stream' if trained is None else trained}; "
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}: {', '.join(map(str, seeds))}. "
        "With several seeds: the mean and its 95 % interval."
        + (_SAME if results["arguments"]["test_split"] == results["arguments"]["validation_split"] else ""),
        "",
        *table(results),
    ]
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> list[str]:
    """Return the lines of a Markdown table: a row for each model."""
    names = list(results["runs"][0]["metrics"])
    # of several seeds, scores and times are means, and memory is the most
    head = ["model", *names, "seconds of training", "tokens a second", "peak memory, MiB"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for key, model in results["models"].items():
        runs = [run for run in results["runs"] if run["model"] == key]
        scores = [_said([run["metrics"][name] for run in runs]) for name in names]
        speeds = [run["tokens_per_second"] for run in runs if run["tokens_per_second"] is not None]
        peaks = [run["peak_memory_mib"] for run in runs if run["peak_memory_mib"] is not None]
        cost = [
            f"{statistics.fmean(run['seconds'] for run in runs):,.0f}",
            f"{statistics.fmean(speeds):,.0f}" if speeds else "",
            f"{max(peaks):,.0f}" if peaks else "",
        ]
        lines.append(f"| {' | '.join([model['title'], *scores, *cost])} |")
    return lines


def _said(values: list[float]) -> str:
    mean, half = spread(values)
    return f"{mean:.4f} ± {half:.4f}" if len(values) > 1 else f"{mean:.4f}"


def replace_part(page: Path, start: str, end: str, lines: list[str]) -> None:
    """Put lines between two lines of a page, in the place of what stands there."""
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no part from {start!r} to {end!r}")
    page.write_text("\n".join([before + start, "", *lines, end]) + after, encoding="utf-8")
