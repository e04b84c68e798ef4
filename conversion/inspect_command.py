"""The command ``inspect``, and what ``convert`` shares with it: patterns of a plan, and the report."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_sparse.console import read_pattern
from hf_sparse.conversion.layer_plan import check_budget
from hf_sparse.patterns import Pattern

AUTO = "auto"
DENSITY_HELP = (
    "For the pattern auto: share of all pairs that is read, mean over layers, at the most; above 0, at most 1."
)
TEXTS_HELP = 'UTF-8: a plain text, or a .jsonl whose lines have a "text".'
_PATTERN_HELP = (
    'A pattern as for `convert`, with its settings behind it, as in "longformer window=64 global_tokens=[0]"; or auto, a plan '
    "by layer. May be repeated."
)


def inspect_command(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A dense checkpoint: a folder, or the id of a model on the Hub.")
    ],
    texts: Annotated[str, typer.Option("--texts", metavar="FILE", help=TEXTS_HELP)],
    patterns: Annotated[list[str], typer.Option("--patterns", "--pattern", "-p", help=_PATTERN_HELP)],
    density: Annotated[float | None, typer.Option("--density", help=DENSITY_HELP)] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help="Tokens of a piece of text. [default: what MODEL reads, 2,048 at the most]"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length",
            help="Longest text, in tokens. [default: up to eight times what MODEL reads, if a text is as long]",
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="How positions reach longer texts, as for `convert`.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Page to write as well.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read MODEL's pytorch_model.bin where it has no safetensors.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say how near sparse models stay to a dense one on your texts, before anything is converted.

    \b
    Example:
      hf-sparse inspect roberta-base --texts notes.txt -p "band radius=32" -p auto --density 0.1 --html report.html
    """
    from hf_sparse.conversion.fidelity import inspect_fidelity
    from hf_sparse.conversion.reading import plan_layers

    read = [None if text.strip() == AUTO else read_settings(text) for text in patterns]
    budget = check_auto(None in read, density)
    check_page(html)
    hub: dict[str, Any] = {"allow_pickle": allow_pickle, "revision": revision}
    settings: dict[str, Any] = {"length": length, "max_length": max_length, **hub}
    made = [one if one is not None else plan_layers(source, texts, budget, **settings) for one in read]
    report = inspect_fidelity(source, made, texts, positions=positions, **settings)
    if html is not None:
        report.write_html(html.expanduser())
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    console = Console()
    for one in made:
        if not isinstance(one, Pattern):
            console.print(one.table())
    console.print(report.table())


def check_page(html: Path | None) -> None:
    """Check that a page may be written.

    Raises:
        ValueError: if its folder is missing.
    """
    if html is not None and html.expanduser().is_dir():
        raise ValueError(f"--html {html} is a folder; name a file in it")
    if html is not None and not html.expanduser().absolute().parent.is_dir():
        raise ValueError(f"--html {html}: there is no folder {html.parent}; make it first")


def read_settings(text: str, settings: Sequence[str] = ()) -> Pattern:
    """Return the pattern that one argument describes, settings and all.

    Args:
        text: JSON; or a key, or several joined by "|", and behind them settings as ``--set`` takes them.
        settings: more of them.

    Raises:
        ValueError: if a key, a field or a setting is unknown or malformed.
    """
    if text.lstrip().startswith("{"):
        return read_pattern(text, settings)
    words = shlex.split(text)
    keys = [word for word in words if "=" not in word]
    return read_pattern(" ".join(keys), [*(word for word in words if "=" in word), *settings])


def check_auto(is_auto: bool, density: float | None) -> float:
    """Return the budget of a plan, 0 where no plan is wanted.

    Raises:
        ValueError: if a plan lacks its budget or a budget its plan, or it is no share.
    """
    if is_auto and density is None:
        raise ValueError("--pattern auto needs --density, the share of all pairs that may be read, as in --density 0.1")
    if not is_auto and density is not None:
        raise ValueError("--density is for --pattern auto; leave it out")
    if density is None:
        return 0.0
    check_budget(density)
    return density
