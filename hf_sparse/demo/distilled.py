"""What distillation gives back after a conversion: divergence from the dense model, and the demo's retrieval score.

    python -m hf_sparse.demo.distilled

trains on the documentation of Python's own modules, none of which the demo asks about, and writes a table of recipes/README.md.
"""

import hashlib
import importlib
import json
import pydoc
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer

import hf_sparse
from hf_sparse import recipes
from hf_sparse.demo.compare import mean_reciprocal_rank, paired_interval, ranks, recall_at_1
from hf_sparse.demo.corpus import read_corpus
from hf_sparse.demo.report import BIGBIRD, LONGFORMER, Row, checked_source, measure
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.results import replace_part, surroundings

PATTERNS = {"longformer": LONGFORMER, "bigbird": BIGBIRD}
STEPS = 40
SETTINGS: dict[str, Any] = {
    "max_length": 1024,
    "max_steps": STEPS,
    "save_steps": STEPS // 2,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "hidden": 1.0,
    "use_cpu": True,
}
# documents of modules for each split
SIZES = {"train": 60, "validation": 4, "test": 8}
START = (
    "<!-- distillation: `python -m hf_sparse.demo.distilled` writes what follows, up to the next line of this kind -->"
)
END = "<!-- end of distillation -->"
HERE = Path(recipes.__file__).parent


def main() -> None:
    """Measure, and write the table and results/distilled.json."""
    source, console = checked_source(), Console(stderr=True)
    corpus = read_corpus(AutoTokenizer.from_pretrained(source))
    answers = [index for index, _ in corpus.scored]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = _write_documents(work / "data")
        for key, pattern in PATTERNS.items():
            sparse = work / key
            hf_sparse.convert(source, sparse, pattern, max_length=corpus.positions, verify=False)
            arguments = RecipeArguments(
                str(sparse), str(data), str(work / f"{key}-run"), teacher=str(source), **SETTINGS
            )
            (run,) = finetune("distill", arguments)["runs"]
            models = {"before": sparse, "after": work / f"{key}-run" / "seed-0"}
            found = {
                when: measure(console, work, Row(f"{key} {when}", model, "whole"), "scored", len(corpus.names))
                for when, model in models.items()
            }
            rank = {when: ranks(held["documents"], held["queries"], answers) for when, held in found.items()}
            gain = paired_interval(rank["after"], rank["before"], answers)
            for when, divergence in (("before", run["before"]), ("after", run["metrics"])):
                scores = {"recall@1": recall_at_1(rank[when]), "mrr": mean_reciprocal_rank(rank[when])}
                rows.append({"model": key, "when": when, **divergence, **scores})
            rows[-1]["gain"] = [gain.difference, gain.low, gain.high]
            rows[-1]["seconds"] = run["seconds"]
    held = {"rows": rows, "settings": SETTINGS, "splits": SIZES, **surroundings(use_cpu=True)}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "distilled.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    replace_part(HERE / "README.md", START, END, _lines(held))


def _write_documents(folder: Path) -> Path:
    """Write what ``help`` says of modules of the standard library, chosen by the hashes of their names."""
    names = sorted(
        (name for name in sys.stdlib_module_names if not name.startswith("_")),
        key=lambda name: hashlib.sha256(name.encode()).hexdigest(),
    )
    texts = (text for name in names if (text := _documentation(name)) is not None)
    folder.mkdir()
    for split, count in SIZES.items():
        lines = [json.dumps({"text": next(texts)}) for _ in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def _documentation(name: str) -> str | None:
    """Return the beginning of a module's documentation; None of one that is lacking, acts on import or says little."""
    if name in {"antigravity", "this", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    text = pydoc.plain(pydoc.render_doc(module))
    return text[:20_000] if len(text) > 4_000 else None


def _lines(held: dict[str, Any]) -> list[str]:
    lines = [
        "| model | | divergence to 512 tokens | to 1,024 | recall@1 | MRR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in held["rows"]:
        cells = [f"{row[name]:.4f}" for name in ("kl", "kl_long", "recall@1", "mrr")]
        lines.append(f"| {row['model']} | {row['when']} | {' | '.join(cells)} |")
    gains = [row for row in held["rows"] if "gain" in row]
    said = "; ".join(
        f"{row['model']} {row['gain'][0]:+.3f} [{row['gain'][1]:+.3f}, {row['gain'][2]:+.3f}]" for row in gains
    )
    seconds = statistics.fmean(row["seconds"] for row in gains)
    return [
        f"all-MiniLM-L6-v2 converted, and after {STEPS} steps of 4 rows from the documentation of {SIZES['train']} modules, "
        f"half of them cut at 512 tokens; {seconds:,.0f} s. The divergence is of how near tokens are to one another, "
        f"in nats a token, on {SIZES['test']} other modules. Recall@1 and MRR are the demo's. "
        f"Gain of recall@1, paired, with its 95 % interval (one that holds 0 is a tie): {said}. "
        f"Device {held['device']}, {held['threads']} threads, torch {held['versions']['torch']}.",
        "",
        *lines,
        "",
        "Command: `python -m hf_sparse.demo.distilled`.",
        "",
    ]


if __name__ == "__main__":
    main()
