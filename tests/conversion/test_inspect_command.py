"""``hf-sparse inspect`` and ``--pattern auto``: what they print and write, and bad use in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import hf_sparse
from hf_sparse.console import make_app, run
from hf_sparse.conversion import costs, layer_plan
from hf_sparse.conversion.command import convert_command
from hf_sparse.conversion.inspect_command import inspect_command, read_settings

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs ``inspect`` or ``convert`` here: its exit code, stdout and stderr."""
    monkeypatch.setattr(costs, "_LONGEST", 256)
    monkeypatch.setattr(layer_plan, "LEVELS", (0.5, 1.0))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "text.txt").write_text("every long page of the river reads a stone word " * 40)
    places = {"{model}": str(bert), "{text}": str(tmp_path / "text.txt"), "{room}": str(tmp_path)}

    def run_here(name: str, *args: str) -> tuple[int, str, str]:
        app = make_app()
        app.command()({"inspect": inspect_command, "convert": convert_command}[name])
        given = list(args)
        for place, path in places.items():
            given = [arg.replace(place, path) for arg in given]
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run(app, f"hf-sparse {name}", given)
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, said.out, said.err

    return run_here


def test_inspect_prints_a_report_and_writes_a_page(command: Command, tmp_path: Path) -> None:
    args = ("{model}", "--texts", "{text}", "--patterns", "band radius=4", "-p", "auto", "--density", "0.2")
    code, out, err = command("inspect", *args, "--html", "{room}/report.html")
    assert (code, err) == (0, "")
    for said in (
        "band(radius=4)",
        "auto, density 0.2",
        "plan within a density of 0.2",
        "dense",
        "least kept",
        "cosine",
    ):
        assert said in out
    assert "auto, density 0.2" in (tmp_path / "report.html").read_text()
    code, out, err = command("inspect", *args, "--json", "--length", "64", "--max-length", "150")
    held = json.loads(out)
    assert (code, err) == (0, "")
    assert (held["length"], held["longest"], held["lengths"]) == (64, 150, [64, 128])
    assert [one["name"] for one in held["patterns"]] == ["band(radius=4)", "auto, density 0.2"]
    assert held["patterns"][1]["density"] <= 0.2


def test_convert_follows_the_plan_and_says_how_near_it_stays(command: Command, bert: Path, tmp_path: Path) -> None:
    args = ("{model}", "{room}/sparse", "--pattern", "auto", "--density", "0.2", "--texts", "{text}")
    code, out, err = command("convert", *args, "--max-length", "256")
    assert (code, err) == (0, "")
    plan = hf_sparse.plan_layers(bert, tmp_path / "text.txt", 0.2, max_length=256)
    entry = json.loads((tmp_path / "sparse/config.json").read_text())["sparse_attention"]
    assert entry == plan.entry.to_dict()
    for said in ("128 tokens -> 256 tokens", "plan within a density of 0.2", "auto, density 0.2", "loss at 256"):
        assert said in out


def test_convert_with_texts_reports_on_its_one_pattern(command: Command, tmp_path: Path) -> None:
    args = ("{model}", "{room}/sparse", "-p", "band radius=4", "--layer", "1=dense", "--texts", "{text}")
    code, out, err = command("convert", *args, "--json", "--no-verify", "--html", "{room}/page.html")
    assert (code, err) == (0, "")
    report = json.loads(out)["fidelity"]
    (one,) = report["patterns"]
    # a conversion that keeps the length is judged at that length
    assert (report["lengths"], report["longest"]) == ([128], 128)
    assert one["layers"] == {"1": "dense"}
    assert one["kept"][1] == [1.0] * 4
    assert one["name"] == "band(radius=4)"
    assert "band(radius=4)" in (tmp_path / "page.html").read_text()
    card = (tmp_path / "sparse/README.md").read_text()
    assert "### How near it stays to the dense model\n\nOn " in card
    assert "of `text.txt`." in card
    assert f"| band(radius=4) | {one['density']:.4f} |" in card
    assert str(tmp_path) not in card


def test_a_pattern_is_read_with_its_settings() -> None:
    band, first = hf_sparse.pattern("band", radius=3), hf_sparse.pattern("global", positions=(0, 3))
    assert read_settings("band radius=3") == band
    assert read_settings("band | global band.radius=3 'global.positions=[0, 3]'") == band | first
    assert read_settings(json.dumps((band | first).to_dict())) == band | first
    assert read_settings("strided") == hf_sparse.pattern("strided")


INSPECT = ("inspect", "{model}", "--texts", "{text}")
CONVERT = ("convert", "{model}", "{room}/sparse", "-p")
BAD_USE: list[tuple[tuple[str, ...], str]] = [
    (("inspect", "{model}", "-p", "band"), "Missing option '--texts'"),
    (INSPECT, "Missing option '--patterns'"),
    ((*INSPECT, "-p", "bend"), "unknown pattern 'bend'; known: axial, band"),
    ((*INSPECT, "-p", "band width=3"), "pattern 'band' has no field 'width'; known: radius"),
    ((*INSPECT, "-p", "auto"), "--pattern auto needs --density"),
    ((*INSPECT, "-p", "band", "--density", "0.1"), "--density is for --pattern auto; leave it out"),
    ((*INSPECT, "-p", "auto", "--density", "0"), "density must be above 0 and at most 1"),
    ((*INSPECT, "-p", "auto", "--density", "1.1"), "density must be above 0 and at most 1"),
    ((*INSPECT, "-p", "auto", "--density", "0.0001"), "density 0.0001 is too little for pieces of 128 tokens"),
    ((*INSPECT, "-p", "band", "--html", "{room}/none/a.html"), "there is no folder"),
    ((*INSPECT, "-p", "band", "--length", "999"), "length must be from 1 to the 128 tokens"),
    ((*INSPECT, "-p", "band", "--max-length", "9"), "max_length 9 is shorter than the 128 tokens"),
    (("inspect", "{model}", "--texts", "{room}/none.txt", "-p", "band"), "texts: there is no file"),
    (("inspect", "./nowhere", "--texts", "{text}", "-p", "band"), "./nowhere is not a checkpoint"),
    ((*CONVERT, "auto", "--density", "0.1"), "--pattern auto needs --texts FILE, to choose on"),
    ((*CONVERT, "auto", "--texts", "{text}"), "--pattern auto needs --density"),
    ((*CONVERT, "band", "--density", "0.1"), "--density is for --pattern auto; leave it out"),
    ((*CONVERT, "auto", "--density", "0.1", "--texts", "{text}", "--layer", "0=dense"), "leave --set and --layer out"),
    ((*CONVERT, "band", "--texts", "{room}/none.txt"), "texts: there is no file"),
    (
        (*CONVERT, "etc", "--set", "segments=given", "--texts", "{text}"),
        "needs segment_ids, which plain texts have not",
    ),
]


@pytest.mark.parametrize(("args", "says"), BAD_USE, ids=[" ".join(args) for args, _ in BAD_USE])
def test_bad_use_is_told_in_one_line_and_exits_with_2(
    command: Command, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    code, out, err = command(*args)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("name", ["inspect", "convert"])
def test_help_names_the_plan(command: Command, name: str) -> None:
    code, out, _ = command(name, "--help")
    assert code == 0
    assert "--density" in out
