"""The command line, ``hf-sparse``."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hf_sparse import drawing
from hf_sparse.benchmarks.command import bench_command
from hf_sparse.console import PATTERN_HELP, SET_HELP, make_app, read_pattern, run
from hf_sparse.conversion.command import convert_command
from hf_sparse.conversion.export_command import export_command
from hf_sparse.conversion.inspect_command import inspect_command
from hf_sparse.parts import Scope
from hf_sparse.recipes.command import recipe_app

# a mask of that many tokens squared is drawn, a longer one only counted
_MOST_DRAWN = 4096

app = make_app()
app.command("convert")(convert_command)
app.command("export")(export_command)
app.command("inspect")(inspect_command)
app.command("bench")(bench_command)
app.add_typer(recipe_app, name="recipe")


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
def support(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List transformers' model types: which convert, which are refused and why, and which were never tried.

    \b
    Example:
      hf-sparse support
    """
    from rich.console import Console
    from rich.table import Table

    from hf_sparse.integration.census import census

    rows = census()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    table = Table("model type", "status", "why, or how it comes to read longer inputs")
    for row in rows:
        table.add_row(row.model_type, row.status, row.reason)
    Console().print(table)
    counts = {status: sum(row.status == status for row in rows) for status in ("works", "refused", "not tried")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))


@app.command()
def show(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help=PATTERN_HELP)],
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    length: Annotated[int, typer.Option("--length", "-n", help="Tokens, at least 1.")] = 32,
    is_causal: Annotated[bool, typer.Option("--causal", help="Leave out the keys ahead of each query.")] = False,
    heads: Annotated[int, typer.Option("--heads", help="Heads, at least 1; equal ones are drawn once.")] = 1,
    layer: Annotated[int, typer.Option("--layer", min=0, help="Index of the layer, from 0.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Picture to write as well: .png, .svg or .pdf.")] = None,
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
    if out is not None:
        drawing.write_picture(out, made, Scope(length, heads, layer, is_causal))
    if as_json:
        rows = [["".join("01"[edge] for edge in row) for row in head] for head in mask.int().tolist()]
        said = {"pattern": made.to_dict(), "length": length, "layer": layer, "is_causal": is_causal}
        print(json.dumps({**said, **drawing.reading(mask), "mask": rows}, indent=2))
        return
    for line in (*drawing.drawing(mask, width=shutil.get_terminal_size().columns), *drawing.reading_lines(mask)):
        print(line)


@app.command()
def demo(
    work_dir: Annotated[
        Path | None,
        typer.Option("--work-dir", help="Folder for the converted model and the results. [default: a temporary one]"),
    ] = None,
    choose: Annotated[bool, typer.Option("--choose", help="Score candidate settings on the topics set aside.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Convert a real sentence encoder and let it find passages in documents of up to 17,518 tokens.

    \b
    Example:
      hf-sparse demo --work-dir demo
    """
    from hf_sparse.demo import run as run_demo

    run_demo(work_dir=work_dir, choose=choose, as_json=as_json)
