"""The command line: what it prints, its exit codes, and errors in one line."""

import json
import runpy
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import hf_sparse
from hf_sparse import cli
from hf_sparse.conversion import shards
from tests.conftest import Command
from tests.support.checkpoints import write_checkpoint, write_tokenizer


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A tiny BERT in two shards, with a tokenizer: 128 tokens."""
    write_checkpoint(tmp_path / "dense", "Bert", "ForMaskedLM", max_shard_size="60KB")
    write_tokenizer(tmp_path / "dense", "Bert")
    return str(tmp_path / "dense")


def test_patterns_lists_every_pattern_with_its_defaults(hf_sparse_command: Command) -> None:
    code, out, _ = hf_sparse_command("patterns", "--json")
    rows = {row["key"]: row for row in json.loads(out)}
    assert code == 0
    assert rows.keys() == hf_sparse.PATTERNS.keys()
    for key, row in rows.items():
        assert hf_sparse.pattern(key, **row["fields"]).to_dict() == hf_sparse.pattern(key).to_dict()
        assert row["meaning"].endswith(".")
    code, out, _ = hf_sparse_command("patterns")
    assert code == 0
    assert all(key in out for key in rows)


def test_show_draws_a_row_for_a_query(hf_sparse_command: Command) -> None:
    code, out, err = hf_sparse_command("show", "band", "--set", "radius=1", "--length", "4")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "│████    │",
        "│██████  │",
        "│  ██████│",
        "│    ████│",
        "keys a query reads: least 2, median 2.5, most 3",
        "density 0.6250 of 4 x 4 pairs",
    ]
    _, out, _ = hf_sparse_command("show", "band", "--set", "radius=1", "-n", "4", "--causal")
    assert out.splitlines()[1] == "│████    │"


def test_show_draws_heads_that_differ(hf_sparse_command: Command) -> None:
    by_head = hf_sparse.by_head({range(2): hf_sparse.pattern("band", radius=0), 2: hf_sparse.pattern("global")})
    code, out, _ = hf_sparse_command("show", json.dumps(by_head.to_dict()), "--length", "2", "--heads", "3")
    assert code == 0
    assert out.splitlines() == [
        "heads 0 1",
        "│██  │",
        "│  ██│",
        "head 2",
        "│████│",
        "│██  │",
        "keys a query reads: least 1, median 1, most 2",
        "density 0.5833 of 2 x 2 pairs",
    ]


def test_show_as_json_is_the_mask(hf_sparse_command: Command) -> None:
    args = ("bigbird", "--set", "block_size=4", "--set", "random_plan=full_length", "--heads", "2", "--layer", "1")
    code, out, _ = hf_sparse_command("show", *args, "--json")
    said = json.loads(out)
    pattern = hf_sparse.pattern("bigbird", block_size=4, random_plan="full_length")
    mask = torch.tensor([[[char == "1" for char in row] for row in head] for head in said["mask"]])
    assert code == 0
    assert torch.equal(mask, pattern.mask(32, heads=2, layer=1))
    assert said["pattern"] == pattern.to_dict()
    assert said["density"] == pattern.density(32, heads=2, layer=1)
    assert said["most_keys"] == 32


def test_show_writes_a_picture_beside_the_drawing(hf_sparse_command: Command, tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    args = ("show", "band", "--set", "radius=1", "--length", "4")
    assert hf_sparse_command(*args, "--out", str(path)) == hf_sparse_command(*args)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_show_says_what_a_picture_needs(hf_sparse_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse.drawing.find_spec", lambda name: None)
    code, out, err = hf_sparse_command("show", "band", "--out", "mask.png")
    assert (code, out) == (2, "")
    assert err == "hf-sparse: a picture needs matplotlib: pip install 'hf-sparse[plot]'\n"


def test_a_union_is_written_with_a_bar_and_its_fields_with_the_key(hf_sparse_command: Command) -> None:
    settings = ("--set", "band.radius=2", "--set", "global.positions=[0, 3]")
    code, out, _ = hf_sparse_command("show", "band|global", *settings, "--json")
    want = hf_sparse.pattern("band", radius=2) | hf_sparse.pattern("global", positions=(0, 3))
    assert code == 0
    assert json.loads(out)["pattern"] == want.to_dict()


def test_convert_prints_its_report(hf_sparse_command: Command, source: str, tmp_path: Path) -> None:
    made = str(tmp_path / "sparse")
    args = ("convert", source, made, "--pattern", "longformer", "--set", "window=8", "--max-length", "300")
    code, out, err = hf_sparse_command(*args, "--layer", "1=dense", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert report["pattern"] == hf_sparse.pattern("longformer", window=8).to_dict()
    assert (report["layers"], report["max_length"]) == ({"1": "dense"}, 300)
    assert report["wide_open_difference"] is not None
    assert json.loads((tmp_path / "sparse/config.json").read_text())["model_type"] == "sparse_bert"
    code, out, _ = hf_sparse_command(*args, "--overwrite", "--no-verify")
    assert code == 0
    assert "positions tiled" in out
    assert "verify was off" in out


BAD_USE: list[tuple[tuple[str, ...], str]] = [
    (("bogus",), "No such command 'bogus'; try hf-sparse --help"),
    (("show",), "hf-sparse show: Missing argument 'PATTERN'; try hf-sparse show --help"),
    (("show", "band", "--lenght", "3"), "No such option: --lenght"),
    (("show", "band", "--length", "x"), "Invalid value for '--length'"),
    (("show", "band", "--length", "0"), "n and heads must be at least 1, got n=0"),
    (("show", "band", "--length", "5000"), "--length must be at most 4096 tokens to be drawn, got 5000"),
    (("show", "band", "--out", "mask.gif"), "must end in one of .png, .svg, .pdf; got 'mask.gif'"),
    (("show", "band", "--out", "no-such-folder/mask.png"), "No such file or directory: 'no-such-folder/mask.png'"),
    (("show", "bend"), "unknown pattern 'bend'; known: axial, band, bigbird"),
    (("show", "band|bend"), "unknown pattern 'bend' in 'band|bend'; known: axial, band, bigbird"),
    (("show", "band|band"), "names 'band' twice; write such a union as JSON"),
    (("show", "band", "--set", "width=3"), "pattern 'band' has no field 'width'; known: radius"),
    (("show", "band", "--set", "radius"), "--set takes field=value, got 'radius'"),
    (("show", "band", "--set", "radius=wide"), "radius must be a whole number, got 'wide'"),
    (("show", "band|global", "--set", "radius=3"), "say which part it is for, as in band.radius=3"),
    (("show", "band", "--set", "global.radius=3"), "'global' is no part of the pattern; its parts: band"),
    (("show", "longformer", "--set", "window=7"), "window must be even"),
    (("show", "longformer", "--set", "window=0"), "window must be at least 2, got 0"),
    (("show", "longformer", "--set", "window=-4"), "window must be at least 2, got -4"),
    (("show", '{"key": "band"'), "is not valid JSON"),
    (("convert", "a"), "hf-sparse convert: Missing argument 'DST'; try hf-sparse convert --help"),
    (("convert", "{source}", "{made}"), "is dense, so a pattern is needed; pass one (--pattern)"),
    (
        ("convert", "{source}", "{made}", "-p", "band", "--html", "a.html"),
        "--html writes what --texts says, and there are none",
    ),
    (("convert", "{source}", "{made}", "--set", "radius=2"), "--set is for --pattern, and none is named"),
    (("convert", "{source}", "{made}", "--texts", "a.txt"), "--texts compares with a dense SRC, which needs --pattern"),
    (("convert", "./nowhere", "{made}", "-p", "band"), "./nowhere is not a checkpoint"),
    (("convert", "{source}", "{source}", "-p", "band"), "lies in the source"),
    (("convert", "{source}", "{made}", "-p", "band", "--layer", "9=dense"), "unknown layer '9'; known: 0, 1"),
    (("convert", "{source}", "{made}", "-p", "band", "--layer", "dense"), "--layer takes LAYER=PATTERN or LAYER=dense"),
    (("convert", "{source}", "{made}", "-p", "band", "--private"), "private is for what is pushed, and nothing is"),
    (("convert", "{source}", "{made}", "-p", "band", "--push-to", "mine"), "such as 'user/name'; got 'mine'"),
    (
        ("convert", "{source}", "{made}", "-p", "band", "--max-length", "8"),
        "max_length 8 is shorter than the 128 tokens",
    ),
]


@pytest.mark.parametrize(("args", "says"), BAD_USE, ids=[" ".join(args) for args, _ in BAD_USE])
def test_bad_use_is_told_in_one_line_and_exits_with_2(
    hf_sparse_command: Command, source: str, tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    made = tmp_path / "sparse"
    places = {"{source}": source, "{made}": str(made)}
    code, out, err = hf_sparse_command(*(places.get(arg, arg) for arg in args))
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("hf-sparse")
    assert err.count("\n") == 1
    assert not made.exists()


def test_a_failure_on_the_way_exits_with_1(
    hf_sparse_command: Command, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_bytes", full)
    code, out, err = hf_sparse_command("convert", source, str(tmp_path / "sparse"), "-p", "band")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "filled up" in err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 143, ["dense", "sparse.partial"]), (signal.SIGINT, 130, ["dense"])]
)
def test_ctrl_c_cleans_up_first_and_what_a_kill_leaves_is_gone_on_with(
    hf_sparse_command: Command,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    left: list[str],
) -> None:
    arguments = ("convert", source, str(tmp_path / "sparse"), "-p", "band")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_bytes", lambda *_: signal.raise_signal(number))
        assert hf_sparse_command(*arguments)[0] == code
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert hf_sparse_command(*arguments, "--no-verify")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "sparse"]


@pytest.mark.parametrize("command", ["patterns", "show", "convert", "inspect", "demo", "bench"])
def test_every_command_has_help_with_an_example(hf_sparse_command: Command, command: str) -> None:
    code, out, _ = hf_sparse_command(command, "--help")
    assert code == 0
    assert f"Example:\n    hf-sparse {command}" in out


def test_the_example_of_show_runs(hf_sparse_command: Command) -> None:
    settings = ("--set", "band.radius=2", "--set", "global.positions=[0]")
    assert f'"band|global" {" ".join(settings)}' in hf_sparse_command("show", "--help")[1]
    assert hf_sparse_command("show", "band|global", *settings)[0] == 0


def test_without_a_command_it_says_what_there_is(hf_sparse_command: Command) -> None:
    code, out, err = hf_sparse_command()
    assert (code, err) == (0, "")
    assert all(command.name in out for command in cli.app.registered_commands if command.name)
    assert hf_sparse_command("--version")[:2] == (0, f"hf-sparse {hf_sparse.__version__}\n")


def test_the_console_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="hf-sparse")
    assert script.load() is cli.main
    assert isinstance(cli.app, typer.Typer)


@pytest.mark.parametrize(("key", "code"), [("band", 0), ("bend", 2)])
def test_the_module_of_conversion_does_what_the_command_does(
    hf_sparse_command: Command,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    key: str,
    code: int,
) -> None:
    args = [source, str(tmp_path / "sparse"), "--pattern", key, "--json"]
    monkeypatch.setattr(sys, "argv", ["conversion", *args])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("hf_sparse.conversion", run_name="__main__")
    said = capsys.readouterr()
    assert caught.value.code == code
    assert (tmp_path / "sparse/config.json").exists() is (code == 0)
    if code:
        assert said.err.startswith("python -m hf_sparse.conversion: unknown pattern 'bend'")
    else:
        assert json.loads(said.out)["model_type"] == "sparse_bert"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--mode", "slow"), "--mode must be one of quick, full, got 'slow'"),
        (("--device", "tpu"), "--device must be one of cpu, cuda, got 'tpu'"),
        (("--only", "speed"), "--only must be one of attention, models, memory, got 'speed'"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_bench_refuses_what_it_does_not_know(arguments: tuple[str, ...], says: str, hf_sparse_command: Command) -> None:
    code, out, err = hf_sparse_command("bench", *arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_bench_on_cuda_says_that_there_is_none(hf_sparse_command: Command, tmp_path: Path) -> None:
    code, _, err = hf_sparse_command("bench", "--device", "cuda", "--out", str(tmp_path))
    assert code == 2
    assert "torch sees none" in err
    assert list(tmp_path.iterdir()) == []


def test_bench_says_what_to_install(hf_sparse_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = hf_sparse_command("bench")
    assert code == 2
    assert "hf-sparse bench needs local-attention: pip install 'hf-sparse[bench]'" in err
