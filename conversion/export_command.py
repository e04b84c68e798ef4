"""The command ``export``."""

import json
from typing import Annotated

import typer
from rich.console import Console


def export_command(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A sparse checkpoint: a folder, or the id of a model on the Hub.")
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    to: Annotated[str, typer.Option("--to", help="longformer, led or bigbird.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, all of it, if it is not empty.")] = False,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare DST with SRC.")] = True,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write a sparse checkpoint as a class of transformers' own, which runs without this package.

    \b
    Example:
      hf-sparse export roberta-4096 longformer-4096 --to longformer
    """
    from hf_sparse.conversion.export import export

    report = export(source, destination, to, overwrite=overwrite, verify=verify, revision=revision)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    Console().print(report.table())
