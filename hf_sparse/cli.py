"""The command line, ``hf-sparse``."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hf_sparse.benchmarks.command import bench_command
from hf_sparse.console import PATTERN_HELP, SET_HELP, make_app, read_pattern, run
from hf_sparse.conversion.command import convert_command

if TYPE_CHECKING:
    from torch import Tensor

# a mask of that many tokens squared is drawn, a longer one only counted
_MOST_DRAWN = 4096

app = make_app()
app.command("convert")(convert_command)
app.command("bench")(bench_command)


def main() -> NoReturn:
    """Run the command line; what the installed ``hf-sparse`` calls."""
    run(app, "hf-sparse")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, help="Print the version.", callback=lambda on: on and _version())
    ] = False,
) -> None:
    """Sparse attention for Hugging Face Transformers.

    \b
    Example:
      hf-sparse show longformer --set window=8 --set global_tokens=[0]
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def _version() -> NoReturn:
    import hf_sparse

    print(f"hf-sparse {hf_sparse.__version__}")
    raise typer.Exit


@app.command()
def patterns(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the patterns, their fields and defaults.

    \b
    Example:
      hf-sparse patterns
    """
    from rich.console import Console
    from rich.table import Table

    from hf_sparse.patterns import PATTERNS

    rows: list[dict[str, Any]] = []
    for key, cls in PATTERNS.items():
        defaults = cls().to_dict()
        fields = {field.name: defaults[field.name] for field in dataclasses.fields(cls)}
        rows.append(
            {"key": key, "fields": fields, "meaning": (cls.__doc__ or "").strip().splitlines()[0].replace("``", "")}
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("pattern", "fields and defaults", "meaning")
    for row in rows:
        table.add_row(
            row["key"],
            "\n".join(f"{name}={json.dumps(value)}" for name, value in row["fields"].items()),
            row["meaning"],
        )
    Console().print(table)


@app.command()
def show(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help=PATTERN_HELP)],
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    length: Annotated[int, typer.Option("--length", "-n", help="Tokens, at least 1.")] = 32,
    is_causal: Annotated[bool, typer.Option("--causal", help="Leave out the keys ahead of each query.")] = False,
    heads: Annotated[int, typer.Option("--heads", help="Heads, at least 1; equal ones are drawn once.")] = 1,
    layer: Annotated[int, typer.Option("--layer", min=0, help="Index of the layer, from 0.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; the mask as rows of 0 and 1.")] = False,
) -> None:
    """Draw who may read whom: a row is a query, a column a key, a filled cell an edge.

    \b
    Example:
      hf-sparse show "band|global" --set band.radius=2 --set global.positions=[0]
    """
    if length > _MOST_DRAWN:
        raise ValueError(f"--length must be at most {_MOST_DRAWN} tokens to be drawn, got {length}")
    made = read_pattern(pattern, settings or ())
    mask = made.mask(length, heads=heads, layer=layer, is_causal=is_causal)
    density = made.density(length, heads=heads, layer=layer, is_causal=is_causal)
    if as_json:
        rows = [["".join("01"[edge] for edge in row) for row in head] for head in mask.int().tolist()]
        said = {"pattern": made.to_dict(), "length": length, "layer": layer, "is_causal": is_causal}
        print(json.dumps({**said, "density": density, "mask": rows}, indent=2))
        return
    width = shutil.get_terminal_size().columns
    for names, head in _different(mask):
        if heads > 1:
            print(f"{'head' if ' ' not in names else 'heads'} {names}")
        for line in drawing(head, width=width):
            print(line)
    print(f"density {density:.4f} of {length} x {length} pairs")


def _different(mask: "Tensor") -> Iterator[tuple[str, "Tensor"]]:
    """Yield the masks of heads that differ, each with the indices of the heads that have it."""
    left = list(range(mask.shape[0]))
    while left:
        same = [head for head in left if bool((mask[head] == mask[left[0]]).all())]
        yield " ".join(map(str, same)), mask[same[0]]
        left = [head for head in left if head not in same]


def drawing(mask: "Tensor", *, width: int) -> Iterator[str]:
    """Yield the lines of a drawing of a mask.

    A pair is two characters wide where that fits, else one of half the height; a longer mask is shaded by the share of
    pairs that a character covers.

    Args:
        mask: bool ``[T, T]``.
        width: characters of a line, at least 8.
    """
    length, room = mask.shape[0], max(width, 8) - 2
    has_blocks = "utf" in (sys.stdout.encoding or "").lower()
    edge, full, shades = ("│", "█", " ░▒▓█") if has_blocks else ("|", "#", " .:*#")
    if 2 * length <= room:
        for row in mask.tolist():
            yield edge + "".join(2 * (full if pair else " ") for pair in row) + edge
        return
    step = -(-length // room)
    for top in range(0, length, 2 * step):
        cells = [mask[top : top + 2 * step, left : left + step] for left in range(0, length, step)]
        yield edge + "".join(_cell(cell, shades, has_halves=has_blocks and step == 1) for cell in cells) + edge


def _cell(pairs: "Tensor", shades: str, *, has_halves: bool) -> str:
    """Return the character of some pairs: any edge shows, and only where all are edges it is full."""
    if has_halves:
        return " ▄▀█"[2 * int(pairs[0, 0]) + int(pairs[1:, 0].any())]
    share = pairs.float().mean().item()
    return shades[min(3, 1 + int(share * 3)) if 0 < share < 1 else 4 * int(share)]


@app.command()
def demo(
    work_dir: Annotated[
        Path | None,
        typer.Option("--work-dir", help="Folder for the converted model and the results. [default: a temporary one]"),
    ] = None,
    choose: Annotated[bool, typer.Option("--choose", help="Score candidate settings on the topics set aside.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Convert a real sentence encoder and let it find passages in documents of up to 17,000 tokens.

    \b
    Example:
      hf-sparse demo --work-dir demo
    """
    from hf_sparse.demo import run as run_demo

    run_demo(work_dir=work_dir, choose=choose, as_json=as_json)
