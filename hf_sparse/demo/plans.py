"""A plan by layer beside every single pattern at equal density, on texts that it was not chosen on: ``docs/fidelity.md``.

python -m hf_sparse.demo.plans --data DIR

DIR holds ``cuad/`` and ``qmsum/``, each with ``train.parquet`` and ``test.parquet`` that have a column ``text``.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers.utils import logging

from hf_sparse.conversion.comparison import load_sparse, read
from hf_sparse.conversion.layer_plan import LayerPlan, layer_key, pattern_name, sized, systems
from hf_sparse.conversion.progress import counting
from hf_sparse.conversion.reading import Reading, open_reading, plan_on
from hf_sparse.conversion.target import plan_target
from hf_sparse.demo.report import checked_source
from hf_sparse.integration.kept import noting_kept
from hf_sparse.patterns import Pattern
from hf_sparse.recipes.results import replace_part, spread

LENGTH = 512
DENSITIES = (0.05, 0.1, 0.2)
SETS = ("cuad", "qmsum")
# texts of each set: a plan is chosen on the first of the training split, and judged on the first of the test split
CHOSEN_ON, JUDGED_ON = 8, 32
PAGE = Path("docs/fidelity.md")
START = "<!-- plans: `python -m hf_sparse.demo.plans` writes what follows, up to the next line of this kind -->"
END = "<!-- end of plans -->"
MEASURES = ("kept", "cosine of tokens", "cosine of the mean")


@dataclass(frozen=True, eq=False)
class Row:
    """A pattern or a plan, and what was measured of it.

    Attributes:
        name: in words.
        density: pairs that are read, over all pairs, mean over layers.
        scores: float64 ``[texts, 3]``: kept attention, cosine of the last hidden states (mean over tokens), and cosine of their
            means over the text.
    """

    name: str
    density: float
    scores: Tensor


def write_texts(data: Path, split: str, texts: int, path: Path) -> None:
    """Write the first texts of a split of each set into a .jsonl, in turn."""
    held = [
        datasets.load_dataset("parquet", data_files=str(data / name / f"{split}.parquet"), split=f"train[:{texts}]")[
            "text"
        ]
        for name in SETS
    ]
    lines = [json.dumps({"text": text}) for turn in zip(*held, strict=True) for text in turn]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_pieces(reading: Reading) -> tuple[Tensor, ...]:
    """Return one piece of each text that is long enough, int64 ``[1, length]``: pieces of one text would not be independent."""
    room = reading.length - reading.texts.special
    return reading.texts.pieces(reading.length, sum(len(text) >= room for text in reading.texts.documents))


def measured(
    reading: Reading,
    dense: Any,
    held: Sequence[Pattern | LayerPlan],
    pieces: Sequence[Tensor],
    count: Callable[[int], None],
) -> list[Row]:
    """Measure patterns and plans on pieces of text.

    Args:
        reading: the checkpoint.
        dense: the dense model.
        held: the patterns and plans.
        pieces: int64 ``[1, T]`` each.
        count: told of each piece that was read by all.
    """
    targets = [
        plan_target(reading.checkpoint, one)
        if isinstance(one, Pattern)
        else plan_target(reading.checkpoint, one.pattern, layers=one.layers)
        for one in held
    ]
    models = [load_sparse(target, reading.checkpoint.folder) for target in targets]
    patterns = {
        layer_key(one): [target.entry.pattern_of(one.stack, one.index) for target in targets]
        for one in reading.target.layers
    }
    scores = []
    for row in pieces:
        with noting_kept(dense, patterns) as kept:
            want, _ = read(dense, row)
        shares = torch.stack([share.mean(1) for share in kept.shares.values()]).mean(0)
        cosines = [_cosines(want.double(), read(model, row)[0].double()) for model in models]
        scores.append(torch.cat([shares[:, None], torch.stack(cosines)], 1))
        count(1)
    by_row = torch.stack(scores, 1)
    names = [pattern_name(one) if isinstance(one, Pattern) else "**auto**" for one in held]
    densities = [target.density(reading.length) for target in targets]
    return [Row(*found) for found in zip(names, densities, by_row, strict=True)]


def _cosines(want: Tensor, got: Tensor) -> Tensor:
    """Return the cosine of tokens, mean over them, and that of their means, float64 ``[2]``."""
    tokens = cosine_similarity(want, got, dim=1).mean()
    return torch.stack([tokens, cosine_similarity(want.mean(0), got.mean(0), dim=0)])


def verdict(gains: Tensor) -> tuple[str, str]:
    """Return a mean gain with its 95 % interval, and whether it is a win, a loss or a tie.

    Args:
        gains: float64 ``[texts]``, the plan's score minus another one's on the same text.
    """
    mean, half = spread(gains.tolist())
    said = f"{mean:+.4f} ± {half:.4f}"
    if abs(mean) <= half:
        return said, "tie"
    return said, "win" if mean > 0 else "loss"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table in Markdown: the plan, which is the first row, beside the others."""
    auto = rows[0]
    heads = [f"{name} | auto's gain" for name in MEASURES]
    yield f"| pattern | density | {' | '.join(heads)} |"
    yield f"| --- | --- |{' --- | --- |' * len(MEASURES)}"
    for row in rows:
        cells = []
        for at in range(len(MEASURES)):
            said, word = ("", "") if row is auto else verdict(auto.scores[:, at] - row.scores[:, at])
            cells.append(f"{row.scores[:, at].mean():.4f} | {said}{', ' if word else ''}{word}")
        # a bar would end the cell
        name = row.name.replace("|", "\\|")
        yield f"| {name} | {row.density:.4f} | {' | '.join(cells)} |"


def tally(tables: Sequence[Sequence[Row]]) -> Iterator[str]:
    """Yield how often the plan wins, ties and loses, for each measure."""
    for at, name in enumerate(MEASURES):
        words = [verdict(rows[0].scores[:, at] - row.scores[:, at])[1] for rows in tables for row in rows[1:]]
        yield (
            f"- {name}: of {len(words)} comparisons auto wins {words.count('win')}, ties {words.count('tie')} and loses "
            f"{words.count('loss')}."
        )


def lines(data: Path) -> Iterator[str]:
    """Yield the part of the page, in Markdown.

    Args:
        data: the folder of the sets.
    """
    source, tables = checked_source(), []
    with tempfile.TemporaryDirectory() as folder:
        train, test = Path(folder, "train.jsonl"), Path(folder, "test.jsonl")
        write_texts(data, "train", CHOSEN_ON, train)
        write_texts(data, "test", JUDGED_ON, test)
        chosen_on, judged_on = (open_reading(source, path, length=LENGTH) for path in (train, test))
        dense, _ = judged_on.load_dense()
        first, pieces = first_pieces(judged_on), first_pieces(chosen_on)
        for density in DENSITIES:
            plan = plan_on(chosen_on, dense, pieces, density)
            layer = judged_on.target.layers[0]
            single = [sized(name, density, layer, LENGTH) for name in systems(LENGTH)]
            held: list[Pattern | LayerPlan] = [plan, *(pattern for pattern in single if pattern is not None)]
            with counting(len(first), None, doing=f"density {density:g}") as count:
                rows = measured(judged_on, dense, held, first, count)
            tables.append(rows)
            yield f"### Density {density:g}"
            yield ""
            yield from table(rows)
            yield ""
            yield f"The plan keeps {plan.kept:.4f} on the {plan.texts} pieces that it was chosen on. Its layers:"
            yield ""
            for choice in plan.choices:
                name = pattern_name(choice.pattern)
                yield f"- {choice.layer}: `{name}`, density {choice.density:.4f}, keeps {choice.kept:.4f}"
            yield ""
        yield "### In short"
        yield ""
        yield from tally(tables)
        yield ""
        yield (
            f"{len(first)} texts of the test splits, one piece of {LENGTH} tokens of each; intervals by Student's t over their "
            f"paired differences. With so many comparisons some exclude 0 by chance. Measured with torch {torch.__version__}."
        )
        yield ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the part of the page."""
    parser = argparse.ArgumentParser(prog="python -m hf_sparse.demo.plans", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Folder with cuad/ and qmsum/.")
    data = parser.parse_args(arguments).data
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in SETS:
        for split in ("train", "test"):
            if not (data / name / f"{split}.parquet").is_file():
                parser.error(
                    f"{data / name / split}.parquet is not there; --data names the folder that holds {' and '.join(SETS)}"
                )
    replace_part(PAGE, START, END, list(lines(data)))


if __name__ == "__main__":
    main()
