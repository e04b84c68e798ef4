"""What a recipe found, as JSON for programs and as a Markdown table for people."""

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers

import hf_sparse
from hf_sparse.recipes.processes import count_processes


def spread(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval by Student's t; 0 for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, 0.0
    from scipy.stats import t

    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def surroundings() -> dict[str, Any]:
    """Return versions, device, processes, and the commit of the folder that this runs in; None where that is no checkout."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    packages = (hf_sparse, torch, transformers, accelerate, datasets)
    return {
        "versions": {package.__name__: package.__version__ for package in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "processes": count_processes(),
        "commit": asked.stdout.strip() or None,
    }


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json and results.md.

    Args:
        folder: that holds the runs.
        results: "task", "arguments", "splits" (name to number of documents), "runs": for each seed "seed", "metrics",
            "seconds", "tokens_per_second" and "peak_memory_mib" (None where it is not measured).
    """
    held = {**results, **surroundings()}
    (folder / "results.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    runs = results["runs"]
    lines = [
        f"# {results['task']}: {results['arguments']['model']}",
        "",
        f"Test split of {results['splits']['test']} documents, trained on {results['splits']['train']}; "
        f"{len(runs)} {'seed' if len(runs) == 1 else 'seeds'}: {', '.join(str(run['seed']) for run in runs)}. "
        "With several seeds: the mean and its 95 % interval.",
        "",
        "| metric | value |",
        "| --- | --- |",
    ]
    for name in runs[0]["metrics"]:
        mean, half = spread([run["metrics"][name] for run in runs])
        lines.append(f"| {name} | {mean:.4f}{f' ± {half:.4f}' if len(runs) > 1 else ''} |")
    lines.append(f"| seconds of training steps | {statistics.fmean(run['seconds'] for run in runs):.1f} |")
    lines.append(f"| tokens a second | {statistics.fmean(run['tokens_per_second'] for run in runs):,.0f} |")
    if runs[0]["peak_memory_mib"] is not None:
        lines.append(f"| peak memory, MiB | {max(run['peak_memory_mib'] for run in runs):,.0f} |")
    (folder / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
