"""Tokens a second of a fine-tuning step, dense beside sparse, at growing lengths in one run; writes a table of the page.

python -m hf_sparse.demo.step_speed
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import hf_sparse
from hf_sparse import recipes
from hf_sparse.benchmarks.timing import Cell, time_cells
from hf_sparse.demo.report import BIGBIRD, LONGFORMER, checked_source
from hf_sparse.integration.positions import lengthen_, wanted_limits
from hf_sparse.recipes.results import replace_part, surroundings

LENGTHS = (4096, 8192, 16384)
PATTERNS = {"longformer": LONGFORMER, "bigbird": BIGBIRD}
DENSE = "dense, SDPA"
# with dropout torch's dense attention on a CPU holds every pair, which 24 GiB are not enough for at 8,192 tokens
SETTINGS: dict[str, Any] = {"num_labels": 33, "attention_probs_dropout_prob": 0.0}
START = "<!-- speed: `python -m hf_sparse.demo.step_speed` writes what follows, up to the next line of this kind -->"
END = "<!-- end of speed -->"
HERE = Path(recipes.__file__).parent


def main() -> None:
    """Measure, and write the table and results/step_speed.json."""
    source = str(checked_source())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for length in LENGTHS:
            models = {DENSE: _dense(source, length)}
            for key, pattern in PATTERNS.items():
                path = Path(folder, f"{key}-{length}")
                hf_sparse.convert(source, path, pattern, max_length=length, verify=False)
                models[key] = AutoModelForSequenceClassification.from_pretrained(path, **SETTINGS)
            cells = [
                Cell(name, "step", functools.partial(_step, *_prepared(model, length)), {"length": length})
                for name, model in models.items()
            ]
            rows += time_cells(
                cells, least=3, most=5, seconds=30, device="cpu", is_warm=lambda cell: False, tell=lambda text: None
            )
    held = {"rows": rows, **surroundings(use_cpu=True)}
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "step_speed.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    replace_part(HERE / "README.md", START, END, _lines(held))


def _dense(source: str, length: int) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(source, attn_implementation="sdpa", **SETTINGS)
    config = AutoConfig.from_pretrained(source)
    for field, value in wanted_limits(config, max_length=length).items():
        setattr(config, field, value)
    lengthen_(model, config)
    return model


def _prepared(model: Any, length: int) -> tuple[Any, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (1, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(1, dtype=torch.long)}
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-5), batch


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    optimizer.zero_grad()
    model(**batch).loss.backward()
    optimizer.step()


def _lines(held: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in held["rows"]))
    speed = {(row["name"], row["length"]): row["length"] / row["seconds"] for row in held["rows"]}
    lines = [
        f"| model | {' | '.join(f'{length:,} tokens' for length in LENGTHS)} |",
        f"| --- |{' --- |' * len(LENGTHS)}",
    ]
    for name in names:
        cells = [
            f"{speed[name, length]:,.0f}"
            + ("" if name == DENSE else f" ({speed[name, length] / speed[DENSE, length]:.2f}x)")
            for length in LENGTHS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    rounds = min(row["rounds"] for row in held["rows"])
    return [
        "Tokens a second: forward, backward and AdamW of all-MiniLM-L6-v2 without dropout in attention, one document, "
        f"float32; medians of at least {rounds} rounds in turns. Device {held['device']}, {held['threads']} threads, "
        f"torch {held['versions']['torch']}.",
        "",
        *lines,
        "",
        "Command: `python -m hf_sparse.demo.step_speed`.",
        "",
    ]


if __name__ == "__main__":
    main()
