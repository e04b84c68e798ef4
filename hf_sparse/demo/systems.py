"""Every text system on the demo's task, without training: a part of ``docs/patterns.md``. ``make systems`` writes it."""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

import hf_sparse
from hf_sparse.demo.compare import mean_reciprocal_rank, paired_interval, ranks, recall_at_1
from hf_sparse.demo.corpus import PASSAGE, Corpus, read_corpus
from hf_sparse.demo.embed import CHUNK
from hf_sparse.demo.fidelity import fidelity_lines
from hf_sparse.demo.report import BIGBIRD, LONGFORMER, Row, checked_source, dense_rows, measure
from hf_sparse.patterns import PATTERNS, Pattern, pattern, pattern_from_dict

# what stands outside of these two lines is written by hand, or by others
START = "<!-- systems: `make systems` writes what follows, up to the next line of this kind -->"
END = "<!-- end of systems -->"

# keys are counted in a text of so many tokens
COUNTED_AT = 4096

# The first is the one the others are compared with. Apart from it and BigBird, whose settings the demo chose on other topics,
# settings are the defaults or were fixed before anything was scored.
SYSTEMS = (
    LONGFORMER,
    BIGBIRD,
    pattern_from_dict({**BIGBIRD.to_dict(), "num_external_global": 64}),
    pattern("star", radius=32),
    pattern("star"),
    pattern("etc", num_global=64),
    pattern("etc", segments=64),
    pattern("sparse_transformer", summary=16),
    pattern("sparse_transformer", kind="strided"),
    pattern("bp_transformer", nodes_per_level=16, spans="pooled"),
    pattern("bp_transformer", nodes_per_level=16),
    pattern("band", radius=128),
    pattern("dilated", radius=128),
    pattern("strided"),
    pattern("block_local"),
    pattern("global"),
    pattern("random", block_size=32),
)

RETRIEVAL = """\
## The text systems on one task, without training

The task is that of `make demo`: all-MiniLM-L6-v2, which has 512 positions, is converted to each system without training, reads
all {topics} topics of Python's manual (up to {longest:,} tokens), and is asked which of them each of {queries} passages of
{passage} tokens comes from, all from deep inside {scored} long topics. So the table shows what is left of a dense checkpoint
under a pattern, not what a model becomes that is trained with it. Nor does it show how near a pattern comes to the dense model:
at full length that one is weak itself.

A system is named with the fields that differ from their defaults. Window and block size of `longformer` and `bigbird` were
chosen on {chosen_on} other topics, which are not scored; nothing was tuned for the other systems. Keys are what a token of
a text of {counted_at:,} tokens reads on average, with what nodes read counted in; density is the share of all pairs. The last
column is the recall@1 of `longformer` minus that of the row, with its paired bootstrap 95 % interval over topics: where it
contains 0, no difference is shown, and of twenty rows one may exclude it by chance. {images} are for images and left out.
Measured with torch {torch}.

| system | keys | density | recall@1 | MRR | gain of `longformer` [95 %] |
| --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Score:
    """A row of the table: its first cells, and the rank of each query's answer, int64 ``[Q]``."""

    cells: str
    rank: Tensor


def text_systems() -> list[str]:
    """Return the keys of the patterns that know positions alone and do not ask for a grid of pixels."""
    return [key for key, cls in PATTERNS.items() if cls.on_grid is Pattern.on_grid and not cls.is_content_based]


def check_complete() -> None:
    """Check that every text system has a row.

    Raises:
        ValueError: if one has none.
    """
    held = {system.key for system in SYSTEMS}
    for key in text_systems():
        if key not in held:
            raise ValueError(f"add a line for {key} to SYSTEMS in hf_sparse/demo/systems.py, then run make systems")


def named(system: Pattern) -> str:
    """Return a pattern as Python calls it, with the fields that differ from their defaults."""
    held = {field.name: getattr(system, field.name) for field in dataclasses.fields(system)}
    fields = [f.name for f in dataclasses.fields(system) if held[f.name] != f.default]
    return f"{system.key}({', '.join(f'{name}={held[name]!r}' for name in fields)})"


def cells(system: Pattern) -> str:
    """Return what the table says of a system before it has been scored."""
    density = system.density(COUNTED_AT)
    return f"`{named(system)}` | {density * COUNTED_AT:,.1f} | {density:.4f}"


def put_between(text: str, lines: list[str]) -> str:
    """Return the text of the page with its generated part replaced.

    Raises:
        ValueError: if the two lines between which to write are missing.
    """
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"docs/patterns.md must hold the two lines {START!r} and {END!r}")
    return "\n".join([before + start, "", *lines, "", end + after])


def write_part(path: Path) -> None:
    """Measure, and write the generated part of a page.

    Raises:
        HfSparseError: if the model package is missing or its weights are not the known ones, or a row failed.
        ValueError: if the page lacks the two lines between which to write, or a text system has no row.
    """
    check_complete()
    put_between(path.read_text(), [])
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = checked_source()
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = read_corpus(tokenizer)
    with tempfile.TemporaryDirectory(prefix="hf-sparse-systems-") as folder:
        scores = list(measured(console, Path(folder), source, corpus))
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    lines = [*retrieval_lines(scores, corpus), "", *fidelity_lines(source, corpus, special)]
    path.write_text(put_between(path.read_text(), lines))
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def measured(console: Console, work_dir: Path, source: Path, corpus: Corpus) -> Iterator[Score]:
    """Convert to each system in turn and score it as the demo does, after the dense rows; print a line for each."""
    folder = work_dir / "converted"
    hf_sparse.convert(source, folder, SYSTEMS[0], max_length=corpus.positions)
    truncated, chunks, full = dense_rows(source, folder)
    chunked = pattern("block_local", block_size=CHUNK).density(COUNTED_AT)
    dense = (
        (truncated, f"{truncated.name} | {CHUNK} |"),
        (chunks, f"{chunks.name} | {CHUNK} | {chunked:.4f}"),
        (full, f"{full.name} | {COUNTED_AT:,} | 1.0000"),
    )
    for row, first_cells in dense:
        yield Score(first_cells, _ranked(console, work_dir, row, corpus))
    for system in SYSTEMS:
        hf_sparse.convert(source, folder, system, max_length=corpus.positions, overwrite=True)
        yield Score(cells(system), _ranked(console, work_dir, Row(named(system), folder, "whole"), corpus))


def _ranked(console: Console, work_dir: Path, row: Row, corpus: Corpus) -> Tensor:
    held = measure(console, work_dir, row, "scored", len(corpus.names))
    rank = ranks(held["documents"], held["queries"], [index for index, _ in corpus.scored])
    console.print(f"{row.name}: recall@1 {recall_at_1(rank):.3f}, {held['seconds']:.0f} s", soft_wrap=True)
    return rank


def retrieval_lines(scores: list[Score], corpus: Corpus) -> Iterator[str]:
    """Yield the section about retrieval, in Markdown."""
    topics = [index for index, _ in corpus.scored]
    ours = next(score for score in scores if score.cells == cells(SYSTEMS[0]))
    yield from RETRIEVAL.format(
        topics=len(corpus.names),
        longest=corpus.longest,
        queries=len(topics),
        passage=PASSAGE,
        scored=len(set(topics)),
        chosen_on=len({index for index, _ in corpus.chosen_on}),
        counted_at=COUNTED_AT,
        images=", ".join(f"`{key}`" for key, cls in PATTERNS.items() if cls.on_grid is not Pattern.on_grid),
        torch=torch.__version__,
    ).splitlines()
    intervals = [paired_interval(ours.rank, score.rank, topics) for score in scores]
    for score, held in zip(scores, intervals, strict=True):
        found = f"{recall_at_1(score.rank):.3f} | {mean_reciprocal_rank(score.rank):.3f}"
        gain = f"{held.difference:+.3f} [{held.low:+.3f}, {held.high:+.3f}]" if score is not ours else ""
        yield f"| {score.cells} | {found} | {gain} |"
    better, worse = (sum(sign * held.difference > 0 and held.excludes_zero for held in intervals) for sign in (1, -1))
    yield ""
    others = len(scores) - 1
    yield (
        f"Of the {others} other rows {better} are worse than `longformer` by that interval and {worse} are better; for "
        f"{others - better - worse} no difference is shown."
    )


if __name__ == "__main__":
    write_part(Path("docs/patterns.md"))
