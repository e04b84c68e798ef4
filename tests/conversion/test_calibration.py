"""``calibrate``: the centroids of the result are those that calibrating it afterwards would give; else nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

import hf_sparse
from hf_sparse.console import make_app, run
from hf_sparse.conversion import calibration
from hf_sparse.conversion.command import convert_command
from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer

BAND = hf_sparse.pattern("band", radius=4)
ROUTING = hf_sparse.pattern("routing", num_clusters=4) | BAND
WORDS = "the river reads a long word\nevery page of stone " * 60


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of 600 tokens."""
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def centroids(folder: Path) -> dict[str, torch.Tensor]:
    """Return what a checkpoint's files hold of centroids."""
    held = {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
    return {name: value for name, value in held.items() if ".sparse_state." in name}


def test_the_centroids_are_those_of_calibrating_afterwards(bert: Path, text: Path, tmp_path: Path) -> None:
    report = hf_sparse.convert(bert, tmp_path / "sparse", ROUTING, max_length=300, calibrate=text)
    hf_sparse.convert(bert, tmp_path / "plain", ROUTING, max_length=300, verify=False)
    assert centroids(tmp_path / "plain") == {}
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    ids = tokenizer(WORDS, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) == 600
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    pieces = [torch.tensor([[begin, *ids[at : at + 298], end]]) for at in (0, 298, 596)]
    hf_sparse.calibrate_(model, [{"input_ids": piece} for piece in pieces])
    want = {name: value for name, value in model.state_dict().items() if ".sparse_state." in name}
    got = centroids(tmp_path / "sparse")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert report.calibration == (f"centroids of 2 layers, by 5 steps of Lloyd's algorithm on the 600 tokens of {text}")
    assert report.added == hf_sparse.conversion.Count(6, sum(value.numel() for value in want.values()))
    assert report.wide_open_difference is not None


def test_the_converted_checkpoint_loads_with_them_and_says_so(bert: Path, text: Path, tmp_path: Path) -> None:
    report = hf_sparse.convert(bert, tmp_path / "sparse", ROUTING, calibrate=str(text), layers={0: BAND}, verify=False)
    model, found = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found.values())
    (own,) = {name.rpartition(".")[0] for name in centroids(tmp_path / "sparse")}
    assert own == "bert.encoder.layer.1.attention.self.sparse_state"
    assert torch.equal(model.get_submodule(own).weight, centroids(tmp_path / "sparse")[f"{own}.weight"])
    assert f"Calibrated: centroids of 1 layer, by 5 steps of Lloyd's algorithm on the 600 tokens of {text}" in str(
        report
    )
    assert report.to_dict()["calibration"] == report.calibration
    card = (tmp_path / "sparse/README.md").read_text()
    assert "Its centroids were moved to the queries and keys that it has on a text." in card
    # where the text lies is nobody's business
    assert "text.txt" not in card
    index = json.loads((tmp_path / "sparse/model.safetensors.index.json").read_text())
    assert {name for name in index["weight_map"] if ".sparse_state." in name} == centroids(tmp_path / "sparse").keys()


def test_centroids_have_the_type_and_the_names_of_their_checkpoint(tmp_path: Path, text: Path) -> None:
    write_checkpoint(tmp_path / "half", "Roberta", "Model", dtype=torch.bfloat16)
    write_tokenizer(tmp_path / "half", "XLMRoberta", max_length=126)
    hf_sparse.convert(tmp_path / "half", tmp_path / "sparse", hf_sparse.pattern("routing"), calibrate=text)
    got = centroids(tmp_path / "sparse")
    assert {name.rpartition(".")[0] for name in got} == {
        f"encoder.layer.{layer}.attention.self.sparse_state" for layer in (0, 1)
    }
    assert {value.dtype for value in got.values()} == {torch.bfloat16}


def test_a_long_text_is_not_read_to_its_end(
    bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_TOKENS", 200)
    report = hf_sparse.convert(bert, tmp_path / "one", ROUTING, calibrate=text, verify=False)
    assert report.calibration is not None
    assert f"on the first 200 tokens of {text}" in report.calibration
    text.write_text(" ".join(WORDS.split()[:200]))
    hf_sparse.convert(bert, tmp_path / "other", ROUTING, calibrate=text, verify=False)
    one, other = (centroids(tmp_path / name) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def write_nothing(path: Path) -> None:
    path.write_text(" \n")


def write_latin(path: Path) -> None:
    path.write_bytes("naïve".encode("latin-1"))


REFUSALS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "missing": ("routing", lambda path: None, "calibrate: there is no file "),
    "folder": ("routing", Path.mkdir, "cannot be read (Is a directory)"),
    "empty": ("routing", write_nothing, "text.txt is empty; pass a text"),
    "not UTF-8": ("routing", write_latin, "text.txt is not UTF-8: byte 2 is 0xef"),
    "nothing to calibrate": (
        "band",
        lambda path: path.write_text(WORDS),
        "no layer has that pattern (the pattern is 'band')",
    ),
    "no centroids": ("reformer|band", lambda path: path.write_text(WORDS), "no layer has that pattern"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_told_in_one_line_and_exits_with_2(
    name: str, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, write, says = REFUSALS[name]
    path = tmp_path / "room/text.txt"
    path.parent.mkdir()
    write(path)
    app = make_app()
    app.command()(convert_command)
    with pytest.raises(SystemExit) as caught:
        run(app, "convert", [str(bert), str(tmp_path / "sparse"), "-p", pattern, "--calibrate", str(path)])
    said = capsys.readouterr()
    assert (caught.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert says in said.err
    assert {place.name for place in tmp_path.iterdir()} == {"bert", "room"}


def test_a_checkpoint_without_a_tokenizer_is_refused(bert: Path, text: Path, tmp_path: Path) -> None:
    for path in bert.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(hf_sparse.ConversionError, match=r"bert has no tokenizer; save one beside its config\.json"):
        hf_sparse.convert(bert, tmp_path / "sparse", ROUTING, calibrate=text)
    write_tokenizer(bert, "Bert")
    text.write_text("нет")
    with pytest.raises(hf_sparse.ConversionError, match=r"text\.txt holds no token that the tokenizer of .*bert knows"):
        hf_sparse.convert(bert, tmp_path / "sparse", ROUTING, calibrate=text)
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("stops", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "overwrite"])
def test_an_interruption_leaves_the_destination_as_it_was(
    bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: type[BaseException], is_there: bool
) -> None:
    if is_there:
        (tmp_path / "sparse").mkdir()
        (tmp_path / "sparse/old.txt").write_bytes(b"old")
    real = calibration.calibrate_

    def stopped(model: Any, batches: Any, **settings: Any) -> None:
        real(model, batches, iterations=1)
        raise stops

    monkeypatch.setattr(calibration, "calibrate_", stopped)
    with pytest.raises(stops):
        hf_sparse.convert(bert, tmp_path / "sparse", ROUTING, calibrate=text, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"bert", "text.txt", *(["sparse"] if is_there else [])}
    assert tree(tmp_path / "sparse") == ({"old.txt": b"old"} if is_there else {})
