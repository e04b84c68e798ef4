"""Weights that torch.save wrote: read when they are asked for by name, and no code of theirs runs."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse
from hf_sparse.errors import ConversionError
from tests.support.checkpoints import tree, write_tokenizer
from tests.support.decoders import tiny_decoder
from tests.support.models import tiny_model

LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def pickled(bert: Path, tmp_path: Path) -> Path:
    """The same checkpoint, its two shards written by torch.save."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in bert.iterdir():
        name = path.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        if path.suffix == ".safetensors":
            torch.save(load_file(path), folder / name)
        elif path.name == INDEX:
            (folder / name).write_text(
                path.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            )
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_pickles_convert_to_the_same_safetensors_when_asked_for(bert: Path, pickled: Path, tmp_path: Path) -> None:
    want = hf_sparse.convert(bert, tmp_path / "sparse", LONGFORMER, max_length=300)
    made = hf_sparse.convert(pickled, tmp_path / "other", LONGFORMER, max_length=300, allow_pickle=True)
    assert made.wide_open_difference == want.wide_open_difference
    assert (made.moved, made.tiled, made.added) == (want.moved, want.tiled, want.added)
    assert made.files_left_behind == ()
    assert made.checksums.keys() == want.checksums.keys()
    held, wanted = tree(tmp_path / "other"), tree(tmp_path / "sparse")
    assert {name for name in held if held[name] != wanted[name]} == {"README.md"}


def test_one_pickle_of_all_weights(bert: Path, tmp_path: Path) -> None:
    weights: dict[str, Any] = {}
    for path in bert.glob("model*"):
        if path.suffix == ".safetensors":
            weights |= load_file(path)
        path.unlink()
    # stored the other way round, as a view, and half as long
    weights = {name: tensor.T.contiguous().T if tensor.dim() == 2 else tensor for name, tensor in weights.items()}
    weights["bert.pooler.dense.bias"] = weights.get("bert.pooler.dense.bias", torch.zeros(32)).bfloat16()
    torch.save(weights, bert / "pytorch_model.bin")
    hf_sparse.convert(bert, tmp_path / "sparse", hf_sparse.pattern("band", radius=8), allow_pickle=True)
    held = load_file(tmp_path / "sparse/model.safetensors")
    assert held.keys() == weights.keys()
    assert all(torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype for name, tensor in weights.items())


@pytest.mark.parametrize(("family", "head"), [("Bert", "ForMaskedLM"), ("Bart", "ForConditionalGeneration")])
def test_weights_that_are_tied_are_written_once(tmp_path: Path, family: str, head: str) -> None:
    made = tiny_decoder(family, head) if family == "Bart" else tiny_model(family, head)
    made.save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(made.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    want = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER)
    found = hf_sparse.convert(tmp_path / "pickled", tmp_path / "other", LONGFORMER, allow_pickle=True)
    assert found.wide_open_difference == want.wide_open_difference
    assert found.moved.numbers - want.moved.numbers <= 64  # final_logits_bias, a buffer that BART saves
    names = [load_file(tmp_path / name / "model.safetensors").keys() for name in ("other", "sparse")]
    assert names[0] - names[1] <= {"final_logits_bias"}


def test_a_pickle_is_read_on_texts_too(bert: Path, pickled: Path, tmp_path: Path) -> None:
    write_tokenizer(pickled, "Bert")
    (tmp_path / "text").write_text("the river reads every page " * 60)
    asked: dict[str, Any] = {"length": 32}
    with pytest.raises(ConversionError, match="pass allow_pickle=True"):
        hf_sparse.plan_layers(pickled, tmp_path / "text", 0.5, **asked)
    plan = hf_sparse.plan_layers(pickled, tmp_path / "text", 0.5, allow_pickle=True, **asked)
    report = hf_sparse.inspect_fidelity(pickled, [plan], tmp_path / "text", allow_pickle=True, **asked)
    assert 0 < report.patterns[0].density <= 0.5


def test_safetensors_come_first(bert: Path, tmp_path: Path) -> None:
    torch.save({}, bert / "pytorch_model.bin")
    report = hf_sparse.convert(bert, tmp_path / "sparse", LONGFORMER, allow_pickle=True, verify=False)
    assert report.files_left_behind == ("pytorch_model.bin",)


class _Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ("code", "cannot be read as a pickle of tensors"),
        ("cut short", "cannot be read as a pickle of tensors"),
        ({}, "holds no tensors by name; save the checkpoint again"),
        ({"epoch": 3}, "epoch is no tensor of a known type, got <class 'int'>"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "a is no tensor of a known type, got torch.complex64"),
    ],
)
def test_a_pickle_of_something_else_is_refused(bert: Path, tmp_path: Path, held: Any, says: str) -> None:
    for path in bert.glob("model*"):
        path.unlink()
    made = bert / "pytorch_model.bin"
    torch.save({"a": _Code(tmp_path / "ran")} if held == "code" else held, made)
    if held == "cut short":
        made.write_bytes(made.read_bytes()[:100])
    with pytest.raises(ConversionError, match=says):
        hf_sparse.convert(bert, tmp_path / "sparse", LONGFORMER, allow_pickle=True)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def test_an_index_that_names_a_tensor_its_pickle_lacks(pickled: Path, tmp_path: Path) -> None:
    path = pickled / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["bert.more.weight"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"lacks bert\.more\.weight, which the index says it holds"):
        hf_sparse.convert(pickled, tmp_path / "sparse", LONGFORMER, allow_pickle=True)
