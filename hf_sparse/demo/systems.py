"""Every text system on the demo's task, without training: a part of ``docs/patterns.md``. ``make systems`` writes it.

``make systems KEYS="routing reformer"`` scores the rows of these keys alone, and puts them beside what the page holds.
"""

import dataclasses
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging

import hf_sparse
from hf_sparse.demo.compare import mean_reciprocal_rank, paired_interval, ranks, recall_at_1
from hf_sparse.demo.corpus import PASSAGE, Corpus, read_corpus
from hf_sparse.demo.embed import CHUNK
from hf_sparse.demo.fidelity import HEAD, fidelity_lines
from hf_sparse.demo.report import BIGBIRD, LONGFORMER, Row, checked_source, dense_rows, measure
from hf_sparse.patterns import LSG, PATTERNS, Pattern, Union, pattern, pattern_from_dict

# what stands outside of these two lines is written by hand, or by others
START = "<!-- systems: `make systems` writes what follows, up to the next line of this kind -->"
END = "<!-- end of systems -->"

# keys are counted in a text of so many tokens
COUNTED_AT = 4096

# what a content-based system is united with: its own edges may leave out what stands beside a token
BAND = pattern("band", radius=64)

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
    pattern("routing", num_clusters=32) | BAND,
    pattern("reformer", chunk_length=32) | BAND,
    pattern("sinkhorn", hard=True) | BAND,
    pattern("sinkhorn", block_size=128),
    pattern("sac"),
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
a text of {counted_at:,} tokens reads on average, with what nodes read counted in; density is the share of all pairs. Of systems
that look at content both are the most there can be, the band counted beside the rest; their settings make them about as many as
those of `longformer`. The centroids of `routing` were calibrated on the {unscored} topics that no passage comes from. The last
column is the recall@1 of `longformer` minus that of the row, with its paired bootstrap 95 % interval over topics: where it
contains 0, no difference is shown, and of twenty rows one may exclude it by chance. {images} are for images and left out.
Measured with torch {torch}.

| system | keys | density | recall@1 | MRR | gain of `longformer` [95 %] |
| --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Score:
    """A row that was scored: its first cells in the table, and the rank of each query's answer, int64 ``[Q]``."""

    cells: str
    rank: Tensor


def text_systems() -> list[str]:
    """Return the keys of the patterns that neither ask for a grid of pixels nor for embeddings that a dense source has not."""
    return [key for key, cls in PATTERNS.items() if cls.on_grid is Pattern.on_grid and cls is not LSG]


def key_of(system: Pattern) -> str:
    """Return the key of the system that a row stands for: of a union, of its first member."""
    return system.patterns[0].key if isinstance(system, Union) else system.key


def check_complete() -> None:
    """Check that every text system has a row.

    Raises:
        ValueError: if one has none.
    """
    held = {key_of(system) for system in SYSTEMS}
    for key in text_systems():
        if key not in held:
            raise ValueError(f"add a line for {key} to SYSTEMS in hf_sparse/demo/systems.py, then run make systems")


def named(system: Pattern) -> str:
    """Return a pattern as Python calls it, with the fields that differ from their defaults."""
    if isinstance(system, Union):
        return " | ".join(map(named, system.patterns))
    held = {field.name: getattr(system, field.name) for field in dataclasses.fields(system)}
    fields = [f.name for f in dataclasses.fields(system) if held[f.name] != f.default]
    return f"{system.key}({', '.join(f'{name}={held[name]!r}' for name in fields)})"


def cells(system: Pattern) -> str:
    """Return what the table says of a system before it has been scored."""
    density = system.density(COUNTED_AT)
    # a bare bar would end the cell
    name = named(system).replace("|", "\\|")
    return f"`{name}` | {density * COUNTED_AT:,.1f} | {density:.4f}"


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


def write_part(path: Path, keys: Sequence[str] = ()) -> None:
    """Measure, and write the generated part of a page.

    Args:
        path: of the page.
        keys: of the systems to score, beside the one that all are compared with; the other rows stay as the page has them.
            Empty scores all, dense rows included, and does the second section too.

    Raises:
        HfSparseError: if the model package is missing or its weights are not the known ones, or a row failed.
        ValueError: if the page lacks the two lines between which to write, a text system has no row, a key is unknown, or
            what is scored does not fit what the page has.
    """
    check_complete()
    text = path.read_text()
    put_between(text, [])
    if unknown := sorted(set(keys) - {key_of(system) for system in SYSTEMS}):
        raise ValueError(f"no row for {', '.join(unknown)}; there are rows for {', '.join(text_systems())}")
    console = Console()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = checked_source()
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = read_corpus(tokenizer)
    with tempfile.TemporaryDirectory(prefix="hf-sparse-systems-") as folder:
        scores = list(measured(console, Path(folder), source, corpus, keys))
    rows = scored_rows(scores, corpus)
    if keys:
        part = text.partition(START)[2].partition(END)[0]
        rows, others = merged(rows, page_rows(part)), fidelity_of(part)
    else:
        others = list(fidelity_lines(source, corpus, (tokenizer.cls_token_id, tokenizer.sep_token_id)))
    lines = [*retrieval_lines(rows, corpus), "", *others]
    path.write_text(put_between(path.read_text(), lines))
    console.print("\n".join(lines), soft_wrap=True, highlight=False, markup=False)


def unscored_text(corpus: Corpus) -> str:
    """Return the topics that no scored passage comes from, one behind the other."""
    scored = {corpus.names[index] for index, _ in corpus.scored}
    return "\n\n".join(topics[name] for name in corpus.names if name not in scored)


def measured(
    console: Console, work_dir: Path, source: Path, corpus: Corpus, keys: Sequence[str] = ()
) -> Iterator[Score]:
    """Convert to each system in turn and score it as the demo does, after the dense rows; print a line for each.

    With keys only the first system and those of these keys.
    """
    folder, text = work_dir / "converted", work_dir / "unscored.txt"
    text.write_text(unscored_text(corpus), encoding="utf-8")
    hf_sparse.convert(source, folder, SYSTEMS[0], max_length=corpus.positions)
    if not keys:
        for row, first_cells in zip(dense_rows(source, folder), dense_cells(), strict=True):
            yield Score(first_cells, _ranked(console, work_dir, row, corpus))
    for system in SYSTEMS:
        if keys and system is not SYSTEMS[0] and key_of(system) not in keys:
            continue
        on = text if key_of(system) == "routing" else None
        hf_sparse.convert(source, folder, system, max_length=corpus.positions, overwrite=True, calibrate=on)
        yield Score(cells(system), _ranked(console, work_dir, Row(named(system), folder, "whole"), corpus))


def dense_cells() -> list[str]:
    """Return what the table says of the dense rows before they have been scored."""
    truncated, chunks, full = (row.name for row in dense_rows(Path(), Path()))
    chunked = pattern("block_local", block_size=CHUNK).density(COUNTED_AT)
    return [f"{truncated} | {CHUNK} |", f"{chunks} | {CHUNK} | {chunked:.4f}", f"{full} | {COUNTED_AT:,} | 1.0000"]


def _ranked(console: Console, work_dir: Path, row: Row, corpus: Corpus) -> Tensor:
    held = measure(console, work_dir, row, "scored", len(corpus.names))
    rank = ranks(held["documents"], held["queries"], [index for index, _ in corpus.scored])
    console.print(f"{row.name}: recall@1 {recall_at_1(rank):.3f}, {held['seconds']:.0f} s", soft_wrap=True)
    return rank


def scored_rows(scores: list[Score], corpus: Corpus) -> dict[str, str]:
    """Return the last cells of each row by its first ones."""
    ours = next(score for score in scores if score.cells == cells(SYSTEMS[0]))
    rows = {}
    for score in scores:
        held = paired_interval(ours.rank, score.rank, [index for index, _ in corpus.scored])
        gain = f"{held.difference:+.3f} [{held.low:+.3f}, {held.high:+.3f}]" if score is not ours else ""
        rows[score.cells] = f"{recall_at_1(score.rank):.3f} | {mean_reciprocal_rank(score.rank):.3f} | {gain}"
    return rows


def page_rows(part: str) -> dict[str, str]:
    """Return the rows of a page's table as ``scored_rows`` does."""
    found = re.findall(r"^\| (.*) \| ([01]\.\d{3} \| [01]\.\d{3} \| .*) \|$", part, re.MULTILINE)
    return dict(found)


def fidelity_of(part: str) -> list[str]:
    """Return the lines of a page's second section, as ``fidelity_lines`` yields them."""
    _, title, rest = part.partition(HEAD.splitlines()[0])
    return (title + rest).rstrip("\n").split("\n")


def merged(new: dict[str, str], old: dict[str, str]) -> dict[str, str]:
    """Return the rows of the whole table, new ones in the place of old ones.

    Raises:
        ValueError: if the row that all are compared with has changed, or a row is in neither.
    """
    ours = cells(SYSTEMS[0])
    if new[ours] != old.get(ours):
        raise ValueError(
            f"{key_of(SYSTEMS[0])} scored {new[ours]!r} here and {old.get(ours)!r} on the page, so single rows do not fit it; "
            "score all with make systems"
        )
    held = {**old, **new}
    wanted = [*dense_cells(), *map(cells, SYSTEMS)]
    if lacking := [name for name in wanted if name not in held]:
        raise ValueError(f"neither scored nor on the page: {'; '.join(lacking)}; name their keys too, or none")
    return {name: held[name] for name in wanted}


def retrieval_lines(rows: dict[str, str], corpus: Corpus) -> Iterator[str]:
    """Yield the section about retrieval, in Markdown, of rows as ``scored_rows`` gives them."""
    scored = {index for index, _ in corpus.scored}
    yield from RETRIEVAL.format(
        topics=len(corpus.names),
        longest=corpus.longest,
        queries=len(corpus.scored),
        passage=PASSAGE,
        scored=len(scored),
        unscored=len(corpus.names) - len(scored),
        chosen_on=len({index for index, _ in corpus.chosen_on}),
        counted_at=COUNTED_AT,
        images=", ".join(f"`{key}`" for key, cls in PATTERNS.items() if cls.on_grid is not Pattern.on_grid),
        torch=torch.__version__,
    ).splitlines()
    yield from (f"| {first} | {last} |" for first, last in rows.items())
    intervals = [tuple(map(float, found)) for last in rows.values() for found in re.findall(r"\[(.*), (.*)\]", last)]
    worse, better = sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)
    yield ""
    others = len(rows) - 1
    yield (
        f"Of the {others} other rows {worse} are worse than `longformer` by that interval and {better} are better; for "
        f"{others - better - worse} no difference is shown."
    )


if __name__ == "__main__":
    write_part(Path("docs/patterns.md"), sys.argv[1:])
