"""The measured results of the recipes: contracts and meetings read whole, cut off, and in chunks.

    python -m hf_sparse.demo.long_documents cuad --data DIR --models DIR

writes a file for each run into recipes/results/, leaves out those that are there, and writes the tables of recipes/README.md.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import hf_sparse
from hf_sparse import recipes
from hf_sparse.demo.report import BIGBIRD, LONGFORMER, checked_source
from hf_sparse.demo.systems import BAND
from hf_sparse.patterns import Pattern
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.finetune import finetune
from hf_sparse.recipes.results import replace_part, spread, surroundings, table

HERE = Path(recipes.__file__).parent
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)
PATTERNS: dict[str, Pattern] = {
    "longformer": LONGFORMER,
    "bigbird": BIGBIRD,
    "routing": hf_sparse.pattern("routing", num_clusters=32) | BAND,
}
# pattern and length of each model by the name of its files; the baselines stand beside the first
MODELS = {f"{name}{suffix}": (name, length) for suffix, length in (("", 4096), ("-8192", 8192)) for name in PATTERNS}
# what stands outside of these two lines is written by hand
START = (
    "<!-- results: `python -m hf_sparse.demo.long_documents` writes what follows, up to the next line of this kind -->"
)
END = "<!-- end of results -->"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained on one dataset.

    Attributes:
        task: of the recipes.
        title: of its table.
        fields: arguments of the recipe.
    """

    task: str
    title: str
    fields: dict[str, Any]


EXPERIMENTS = {
    # of fourteen settings the best on the validation split for the dense model of 512 tokens, seed 100
    "cuad": Experiment(
        "classify",
        "CUAD, 33 clauses of contracts",
        {"label_column": "labels", "train_size": 120, "learning_rate": 2e-5, "head_learning_rate": 6e-2},
    ),
    # the better of 1e-4 and 3e-4, likewise, by mean reciprocal rank, there after two epochs
    "qmsum": Experiment(
        "retrieve",
        "QMSum, the meeting that a query is about",
        {"query_column": "queries.query", "learning_rate": 1e-4, "epochs": 1.0},
    ),
}
SETTINGS = {
    "epochs": 2.0,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "precision": "bf16",
    "truncate": True,
    "use_cpu": True,
}


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data", required=True, help="Folder with train.parquet, validation.parquet and test.parquet.")
    parser.add_argument("--models", required=True, type=Path, help="Folder for converted checkpoints; may hold them.")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="Models to train.")
    held = parser.parse_args()
    dense = str(checked_source())
    for key in held.only:
        name, length = MODELS[key]
        source = held.models / f"{name}-{length}"
        if not source.exists():
            hf_sparse.convert(dense, source, PATTERNS[name], max_length=length, verify=False)
        for seed in SEEDS:
            _measure(held, key, str(source), dense if key == next(iter(MODELS)) else None, seed)
    write_page()


def _measure(held: Any, key: str, source: str, dense: str | None, seed: int) -> None:
    experiment = EXPERIMENTS[held.name]
    path = RESULTS / held.name / f"{key}-{seed}.json"
    if path.exists():
        return
    work = held.models / f"{held.name}-{key}-{seed}"
    arguments = RecipeArguments(
        source,
        held.data,
        str(work),
        baselines=dense,
        seeds=[seed],
        resume=work.exists(),
        **{**SETTINGS, **experiment.fields},
    )
    found = finetune(experiment.task, arguments)
    for run in found["runs"]:
        run.pop("losses")
        # where it was trained is nobody's business
        run.pop("folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: found[name] for name in ("task", "splits", "models", "runs")}
    settings = {**SETTINGS, "learning_rate": arguments.learning_rate, **experiment.fields}
    path.write_text(
        json.dumps({**kept, "settings": settings, **surroundings(use_cpu=True)}, indent=2) + "\n", encoding="utf-8"
    )
    shutil.rmtree(work)


def write_page() -> None:
    """Write the tables of all results into the page beside this module."""
    lines = [line for name in EXPERIMENTS if (RESULTS / name).is_dir() for line in _section(name, RESULTS / name)]
    replace_part(HERE / "README.md", START, END, lines)


def _section(name: str, folder: Path) -> list[str]:
    """Return heading, settings and table of one experiment."""
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    models: dict[str, Any] = {}
    runs = []
    for key, (pattern, _) in MODELS.items():
        for seed in SEEDS:
            found = files.get(f"{key}-{seed}", {"runs": ()})
            for run in found["runs"]:
                own = key if run["model"] == "sparse" else run["model"]
                title = found["models"][run["model"]]["title"]
                # a union is called by its first member
                models.setdefault(own, {"title": title if own != key else f"{pattern}{title[title.index(',') :]}"})
                runs.append({**run, "model": own})
    last = next(reversed(files.values()))
    seeds = {key: [str(run["seed"]) for run in runs if run["model"] == key] for key in models}
    said = "; ".join(f"{models[key]['title']}: {', '.join(held)}" for key, held in seeds.items())
    settings = ", ".join(f"{field} {value}" for field, value in last["settings"].items())
    return [
        f"### {EXPERIMENTS[name].title}",
        "",
        f"all-MiniLM-L6-v2, {settings}. Splits: {', '.join(f'{kind} {size}' for kind, size in last['splits'].items())}. "
        f"Seeds: {said}. Where there are several: the mean and its 95 % interval by Student's t.",
        "",
        *table({"runs": runs, "models": models}),
        "",
        *_gains(runs, models),
        "",
        f"Device {last['device']}, {last['threads']} threads, "
        f"{', '.join(f'{package} {version}' for package, version in last['versions'].items())}. "
        f"Command: `python -m hf_sparse.demo.long_documents {name} --data DIR --models DIR`.",
        "",
    ]


def _gains(runs: list[dict[str, Any]], models: dict[str, Any]) -> list[str]:
    """Return the lines of a table: by how much each model is better than the one that reads the beginning, seed by seed."""
    metrics = list(runs[0]["metrics"])
    held = {(run["model"], run["seed"]): run["metrics"] for run in runs}
    lines = [
        f"| gain over the first tokens alone | {' | '.join(metrics)} |",
        f"| {' | '.join(['---'] * (len(metrics) + 1))} |",
    ]
    for key, model in models.items():
        seeds = [seed for seed in SEEDS if (key, seed) in held and ("truncated", seed) in held]
        if key == "truncated" or not seeds:
            continue
        cells = []
        for metric in metrics:
            gains = [held[key, seed][metric] - held["truncated", seed][metric] for seed in seeds]
            mean, half = spread(gains)
            cells.append(f"{mean:+.4f} ± {half:.4f}" if len(gains) > 1 else f"{mean:+.4f}")
        lines.append(f"| {' | '.join([model['title'], *cells])} |")
    return [*lines, "", "Differences by seed, their mean and its 95 % interval; one that holds 0 shows no difference."]


if __name__ == "__main__":
    main()
