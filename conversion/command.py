"""The command ``convert``, for the command line of the package and for ``python -m hf_sparse.conversion``."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hf_sparse.console import PATTERN_HELP, SET_HELP, read_pattern
from hf_sparse.conversion.inspect_command import (
    AUTO,
    DENSITY_HELP,
    TEXTS_HELP,
    check_auto,
    check_page,
    read_settings,
)
from hf_sparse.patterns import Pattern

if TYPE_CHECKING:
    from hf_sparse.conversion.fidelity import Inspection
    from hf_sparse.conversion.fidelity_report import FidelityReport


def convert_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="A dense checkpoint, or a Longformer, LED, BigBird or BigBird-Pegasus of transformers' own, or LSG's: a "
            "folder, or the id of a model on the Hub.",
        ),
    ],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The folder to write.")],
    pattern: Annotated[
        str | None,
        typer.Option(
            "--pattern",
            "-p",
            help=f"{PATTERN_HELP} Or auto, a plan by layer chosen on --texts. [default: SRC's own, where it is sparse]",
        ),
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest text, in tokens. [default: the source's]"),
    ] = None,
    image_size: Annotated[
        str | None,
        typer.Option(
            "--image-size",
            help="Largest image, in pixels or as HEIGHTxWIDTH; the positions are interpolated. [default: the source's]",
        ),
    ] = None,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            help="How positions reach --max-length. A learned table: tile or interpolate [default: tile]. Rotary ones: none, "
            "linear, ntk, yarn or dynamic [default: none, as they are].",
        ),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option("--layer", help='LAYER=PATTERN or LAYER=dense, as in "3=dense". May be repeated.'),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="A plain text in UTF-8; the centroids of routing move to where SRC's queries and keys are on it.",
        ),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            "--texts", metavar="FILE", help=f"{TEXTS_HELP} Says at the end how near DST stays to SRC on them."
        ),
    ] = None,
    density: Annotated[float | None, typer.Option("--density", help=DENSITY_HELP)] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Page to write of what --texts says.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST, all of it, if it is not empty.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the result, its pattern wide open, with SRC.")
    ] = True,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read SRC's pytorch_model.bin where it has no safetensors.")
    ] = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="Write the few lines with which trust_remote_code=True loads DST where nobody imported hf_sparse.",
        ),
    ] = False,
    push_to: Annotated[
        str | None,
        typer.Option("--push-to", metavar="REPO", help="Push DST to this model on the Hub, with a card and a picture."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the model of --push-to, if it is new, for yourself alone.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Convert a checkpoint into a sparse one that the Auto classes load.

    \b
    Example:
      hf-sparse convert roberta-base roberta-4096 --pattern longformer --set window=512 --max-length 4096
      hf-sparse convert roberta-base roberta-4096 --pattern "routing|band" --max-length 4096 --calibrate book.txt
      hf-sparse convert roberta-base roberta-4096 --pattern longformer --max-length 4096 --push-to me/roberta-4096
      hf-sparse convert roberta-base roberta-4096 --pattern auto --density 0.1 --texts notes.txt --max-length 4096
      hf-sparse convert allenai/led-base-16384 led-sparse --allow-pickle
    """
    from hf_sparse.conversion.convert import convert
    from hf_sparse.conversion.fidelity import plan_inspection
    from hf_sparse.conversion.layer_plan import LayerPlan
    from hf_sparse.conversion.reading import open_reading, plan_on

    is_auto = pattern is not None and pattern.strip() == AUTO
    budget = check_auto(is_auto, density)
    _check_options(is_auto, pattern, settings, layers, texts)
    if html is not None and texts is None:
        raise ValueError("--html writes what --texts says, and there are none; pass --texts FILE, or leave --html out")
    check_page(html)
    named: Mapping[int | str, Pattern | str] = _read_layers(layers or ())
    reading = (
        None
        if texts is None
        else open_reading(source, texts, max_length=max_length, allow_pickle=allow_pickle, revision=revision)
    )
    chosen: Pattern | LayerPlan | None = None
    if is_auto and reading is not None:
        chosen = plan_on(reading, reading.load_dense()[0], reading.pieces[::2], budget)
    elif pattern is not None:
        chosen = read_settings(pattern, settings or ())
    inspection = None
    if reading is not None and chosen is not None:
        # what cannot be inspected is told before anything is written
        longest = reading.target.length_before if max_length is None else max_length
        inspection = plan_inspection(reading, [chosen], max_length=longest, positions=positions, layers=named)
    judged: list[FidelityReport] = []
    report = convert(
        source,
        destination,
        chosen.pattern if isinstance(chosen, LayerPlan) else chosen,
        max_length=max_length,
        image_size=None if image_size is None else _read_size(image_size),
        positions=positions,
        layers=chosen.layers if isinstance(chosen, LayerPlan) else named,
        calibrate=calibrate,
        overwrite=overwrite,
        verify=verify,
        allow_pickle=allow_pickle,
        remote_code=remote_code,
        push_to=push_to,
        private=private or None,
        revision=revision,
        judge=None if inspection is None else _judge(inspection, judged),
    )
    fidelity = judged[0] if judged else None
    if fidelity is not None and html is not None:
        fidelity.write_html(html.expanduser())
    if as_json:
        found = {} if fidelity is None else {"fidelity": fidelity.to_dict()}
        print(json.dumps({**report.to_dict(), **found}, indent=2))
        return
    for said in (report, chosen, fidelity):
        if said is not None and not isinstance(said, Pattern):
            Console().print(said.table())


def _check_options(
    is_auto: bool, pattern: str | None, settings: list[str] | None, layers: list[str] | None, texts: str | None
) -> None:
    """Check that options fit one another.

    Raises:
        ValueError: if one lacks another, or is for something else.
    """
    if is_auto and texts is None:
        raise ValueError("--pattern auto needs --texts FILE, to choose on")
    if is_auto and (settings or layers):
        raise ValueError("--pattern auto chooses the pattern of each layer itself; leave --set and --layer out")
    if pattern is None and settings:
        raise ValueError("--set is for --pattern, and none is named; name one, or leave --set out")
    if pattern is None and texts is not None:
        raise ValueError("--texts compares with a dense SRC, which needs --pattern; name one, or leave --texts out")


def _judge(inspection: "Inspection", judged: "list[FidelityReport]") -> Callable[[Path], str]:
    """Return what compares a destination with its source, keeps the report and gives its table in Markdown."""

    def judge(folder: Path) -> str:
        judged.append(inspection.report(folder))
        return judged[-1].markdown()

    return judge


def _read_size(text: str) -> int | tuple[int, int]:
    numbers = text.lower().split("x")
    if not 1 <= len(numbers) <= 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--image-size takes pixels or HEIGHTxWIDTH, as in 384 or 384x512; got {text!r}")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


def _read_layers(texts: Sequence[str]) -> dict[int | str, Pattern | str]:
    found: dict[int | str, Pattern | str] = {}
    for text in texts:
        key, value = _read_layer(text)
        if key in found:
            raise ValueError(f"--layer names layer {key} twice; leave one of them out")
        found[key] = value
    return found


def _read_layer(text: str) -> tuple[str, Pattern | str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"--layer takes LAYER=PATTERN or LAYER=dense, got {text!r}")
    return key, value if value == "dense" else read_pattern(value)
