"""Sparse checkpoints as Longformer, LED and BigBird of transformers' own, which nobody here wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, PreTrainedModel
from typer.testing import CliRunner

import hf_sparse
from hf_sparse.cli import app
from hf_sparse.errors import ConversionError, UnsupportedModelError
from tests.support.checkpoints import tree, write_checkpoint, write_tokenizer
from tests.support.decoders import tiny_decoder
from tests.support.in_tree import read_by
from tests.support.models import tiny_batch

TOLERANCE = 1e-5
WINDOW = hf_sparse.pattern("longformer", window=16)
BIGBIRD = hf_sparse.pattern("bigbird", block_size=8, num_random_blocks=2, length="padded")
DENSE_DECODER = {"decoder.0": "dense", "decoder.1": "dense"}
KINS = ("Bert", "Roberta", "XLMRoberta", "Camembert")
LONGFORMER = (
    *((kin, head) for kin in KINS for head in ("Model", "ForMaskedLM")),
    *(
        ("Bert", head)
        for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
    ),
    *(("Roberta", head) for head in ("ForSequenceClassification", "ForQuestionAnswering")),
)
BIRDS = (
    *((kin, head) for kin in KINS for head in ("Model", "ForMaskedLM")),
    *(("Bert", head) for head in ("ForPreTraining", "ForTokenClassification", "ForMultipleChoice")),
    ("Roberta", "ForTokenClassification"),
)


def convert(folder: Path, family: str, head: str, pattern: Any, **fields: Any) -> PreTrainedModel:
    """Write ``dense`` and ``sparse`` of 200 tokens into a folder, and return the sparse model."""
    write_checkpoint(folder / "dense", family, head, positions=100)
    hf_sparse.convert(folder / "dense", folder / "sparse", pattern, max_length=200, verify=False, **fields)
    return redrawn(folder / "sparse", f"{family}{head}")


def redrawn(folder: Path, name: str) -> PreTrainedModel:
    """Load a sparse checkpoint, give the projections of its global tokens weights of their own, and save it again."""
    task = "" if name.endswith("Model") else name[name.index("For") :].replace("ConditionalGeneration", "Seq2SeqLM")
    model: PreTrainedModel = getattr(transformers, f"AutoModel{task}").from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".sparse_state." in key:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def batch_of(tokens: int, *, is_global: bool) -> dict[str, torch.Tensor]:
    batch = tiny_batch(tokens, padding=21)
    if is_global:
        batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["global_attention_mask"][:, [0, 3, 40]] = 1
    return batch


@pytest.mark.parametrize(("family", "head"), LONGFORMER)
def test_a_longformer_says_the_same(tmp_path: Path, family: str, head: str) -> None:
    ours = convert(tmp_path, family, head, WINDOW)
    report = hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    assert report.architecture == f"Longformer{head}"
    assert report.difference is not None
    assert report.difference < TOLERANCE
    theirs = getattr(transformers, f"Longformer{head}").from_pretrained(tmp_path / "in-tree")
    for tokens in (90, 200):
        batch = batch_of(tokens, is_global=True)
        want, got = read_by(ours, batch), read_by(theirs, batch)
        assert want.abs().max() > 0.1
        assert (want - got).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("family", "head"), BIRDS)
def test_a_bigbird_says_the_same_in_training_mode(tmp_path: Path, family: str, head: str) -> None:
    ours = convert(tmp_path, family, head, BIGBIRD)
    report = hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "bigbird")
    assert report.architecture == f"BigBird{head}"
    assert report.difference is not None
    assert report.difference < TOLERANCE
    assert any("in evaluation the class reads the first block again" in note for note in report.notes)
    theirs = getattr(transformers, f"BigBird{head}").from_pretrained(tmp_path / "in-tree")
    batch = batch_of(200, is_global=False)
    want, got = read_by(ours, batch), read_by(theirs, batch, training=True)
    assert want.abs().max() > 0.1
    assert (want - got).abs().max() <= TOLERANCE


def test_a_bigbird_of_the_evaluation_plan_says_the_same_in_evaluation(tmp_path: Path) -> None:
    pattern = hf_sparse.pattern("bigbird", block_size=8, num_random_blocks=2, length="padded", random_plan="evaluation")
    ours = convert(tmp_path, "Bert", "Model", pattern)
    report = hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "bigbird")
    assert any("in training the class reads random blocks" in note for note in report.notes)
    theirs = AutoModel.from_pretrained(tmp_path / "in-tree")
    batch = batch_of(197, is_global=False)
    assert (read_by(ours, batch) - read_by(theirs, batch)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("head", ["Model", "ForConditionalGeneration", "ForQuestionAnswering"])
def test_a_led_says_the_same(tmp_path: Path, head: str) -> None:
    tiny_decoder("Bart", head).save_pretrained(tmp_path / "dense")
    # no whole number of windows
    fields: dict[str, Any] = {"max_length": 150, "layers": DENSE_DECODER, "verify": False}
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, **fields)
    ours = redrawn(tmp_path / "sparse", f"Bart{head}")
    report = hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "led")
    assert (report.architecture, report.max_length) == (f"LED{head}", 150)
    assert report.difference is not None
    assert report.difference < TOLERANCE
    theirs = getattr(transformers, f"LED{head}").from_pretrained(tmp_path / "in-tree")
    for tokens in (90, 150):
        batch = batch_of(tokens, is_global=True)
        want = read_by(ours, batch)
        assert want.abs().max() > 0.1
        assert (want - read_by(theirs, batch)).abs().max() <= TOLERANCE


def test_what_was_imported_is_exported_again(tmp_path: Path) -> None:
    convert(tmp_path, "Roberta", "ForMaskedLM", WINDOW)
    hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    hf_sparse.convert(tmp_path / "in-tree", tmp_path / "again")
    hf_sparse.export(tmp_path / "again", tmp_path / "in-tree-again", "longformer")
    first, second = tree(tmp_path / "in-tree"), tree(tmp_path / "in-tree-again")
    assert first["model.safetensors"] == second["model.safetensors"]
    assert json.loads(first["config.json"]) == json.loads(second["config.json"])


def test_it_runs_where_nobody_has_this_package(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", "Roberta")
    ours = convert(tmp_path, "Roberta", "Model", hf_sparse.pattern("band", radius=8))
    for path in (tmp_path / "tokenizer").iterdir():
        (tmp_path / "sparse" / path.name).write_bytes(path.read_bytes())
    report = hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    assert report.notes == ()
    batch = batch_of(64, is_global=False)
    torch.save(batch, tmp_path / "batch")
    code = (
        "import sys, torch; from transformers import AutoModel, AutoTokenizer; "
        f"said = AutoModel.from_pretrained({str(tmp_path / 'in-tree')!r})(**torch.load({str(tmp_path / 'batch')!r})); "
        f"AutoTokenizer.from_pretrained({str(tmp_path / 'in-tree')!r})('a'); "
        f"torch.save(said[0].detach(), {str(tmp_path / 'said')!r}); assert 'hf_sparse' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    said = torch.load(tmp_path / "said")[batch["attention_mask"].bool()]
    assert (said - read_by(ours, batch)).abs().max() <= TOLERANCE


def test_what_belongs_to_the_sparse_checkpoint_stays_behind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model")
    write_tokenizer(tmp_path / "dense", "Bert")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False, remote_code=True)
    (tmp_path / "sparse/sparse_attention.png").write_bytes(b"drawn")
    (tmp_path / "sparse/notes.txt").write_text("kept")
    hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    names = {path.name for path in (tmp_path / "in-tree").iterdir()}
    assert names == {"config.json", "model.safetensors", "notes.txt", "tokenizer.json", "tokenizer_config.json"}
    held = json.loads((tmp_path / "in-tree/config.json").read_text())
    assert not {"sparse_attention", "auto_map", "dense_model_type"} & held.keys()


def test_modules_of_sentence_transformers_come_along(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model")
    write_tokenizer(tmp_path / "dense", "Bert")
    modules = {"1_Pooling/config.json": '{"a": 1}', "2_Dense/config.json": "{}", "2_Dense/model.safetensors": "weights"}
    listed = [
        {"path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
        for path in ("", "1_Pooling")
    ]
    for name, text in {**modules, "modules.json": json.dumps(listed)}.items():
        (tmp_path / "dense" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dense" / name).write_text(text)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False)
    (tmp_path / "sparse" / "pytorch_model.bin").write_text("x")
    hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    assert {name: (tmp_path / "in-tree" / name).read_text() for name in modules} == modules
    assert not (tmp_path / "in-tree" / "pytorch_model.bin").exists()


def test_what_stood_there_comes_back_if_it_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "old").write_text("kept")
    rename = os.rename

    def refuse(one: Any, other: Any) -> None:
        if Path(other) == tmp_path / "to" and not str(one).endswith(".replaced"):
            raise OSError("no")
        rename(one, other)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        hf_sparse.export(tmp_path / "sparse", tmp_path / "to", "longformer", overwrite=True)
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["old"]


def test_half_precision_stays(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model", dtype=torch.bfloat16)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False)
    hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    assert AutoModel.from_pretrained(tmp_path / "in-tree", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("pattern", "fields", "to", "said"),
    [
        (hf_sparse.pattern("dilated", radius=2, dilation=3), {}, "longformer", "layer 0 has the pattern"),
        (hf_sparse.pattern("longformer", window=8, dilation=2), {}, "longformer", "longformer without dilation"),
        (WINDOW, {"layers": {1: "dense"}}, "longformer", "layer 1 is dense; a Longformer has a window on every layer"),
        (hf_sparse.pattern("longformer", window=8, global_tokens=(0,)), {}, "longformer", r"names global tokens \[0\]"),
        (WINDOW, {}, "bigbird", "a BigBird has the pattern bigbird, and the same one on every layer"),
        (BIGBIRD, {"layers": {0: "dense"}}, "bigbird", "the same one on every layer"),
        (
            hf_sparse.pattern("bigbird", block_size=8, seed=3),
            {},
            "bigbird",
            "drawn with seed 3, those of a BigBird with 0",
        ),
        (hf_sparse.pattern("bigbird", block_size=8, random_plan="full_length"), {}, "bigbird", "over the full length"),
        (hf_sparse.pattern("bigbird", block_size=8, num_external_global=2), {}, "bigbird", "has external nodes"),
        (BIGBIRD, {"max_length": 2048}, "bigbird", "draws other random blocks where it reads 2,048 tokens at most"),
        (WINDOW, {}, "led", "is a bert; a LED can be made from bart"),
    ],
)
def test_what_the_class_cannot_say_is_refused(
    tmp_path: Path, pattern: Any, fields: dict[str, Any], to: str, said: str
) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model", positions=100)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, verify=False, **fields)
    with pytest.raises(UnsupportedModelError, match=said):
        hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", to)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "sparse"}


def test_heads_decoders_and_activations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "ForNextSentencePrediction")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False)
    with pytest.raises(UnsupportedModelError, match="a Longformer has no such head; it has Model, ForMaskedLM"):
        hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    write_checkpoint(tmp_path / "gelu", "Bert", "ForMaskedLM", hidden_act="gelu_new")
    hf_sparse.convert(tmp_path / "gelu", tmp_path / "gelu-sparse", WINDOW, verify=False)
    with pytest.raises(UnsupportedModelError, match="one of the two heads computes gelu"):
        hf_sparse.export(tmp_path / "gelu-sparse", tmp_path / "in-tree", "longformer")
    write_checkpoint(tmp_path / "classes", "Bert", "ForSequenceClassification")
    hf_sparse.convert(tmp_path / "classes", tmp_path / "band", hf_sparse.pattern("band", radius=2), verify=False)
    with pytest.raises(
        UnsupportedModelError, match="a band has no global tokens, and LongformerForSequenceClassification"
    ):
        hf_sparse.export(tmp_path / "band", tmp_path / "in-tree", "longformer")
    write_checkpoint(tmp_path / "no-padding", "Bert", "Model", pad_token_id=None)
    hf_sparse.convert(tmp_path / "no-padding", tmp_path / "no-padding-sparse", WINDOW, verify=False)
    with pytest.raises(UnsupportedModelError, match="positions are counted from pad_token_id, and it has none"):
        hf_sparse.export(tmp_path / "no-padding-sparse", tmp_path / "in-tree", "longformer")
    tiny_decoder("Bart", "Model").save_pretrained(tmp_path / "bart")
    hf_sparse.convert(tmp_path / "bart", tmp_path / "bart-sparse", WINDOW, verify=False)
    with pytest.raises(UnsupportedModelError, match="its decoder is sparse, and an LED's is dense"):
        hf_sparse.export(tmp_path / "bart-sparse", tmp_path / "in-tree", "led")


def test_a_classifier_whose_pattern_names_its_first_token_is_exported(tmp_path: Path) -> None:
    pattern = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))
    ours = convert(tmp_path, "Bert", "ForSequenceClassification", pattern)
    hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    theirs = transformers.LongformerForSequenceClassification.from_pretrained(tmp_path / "in-tree")
    batch = batch_of(90, is_global=False)
    assert (read_by(ours, batch) - read_by(theirs, batch)).abs().max() <= TOLERANCE


def test_bad_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model")
    with pytest.raises(ValueError, match="to must be one of longformer, led, bigbird; got 'reformer'"):
        hf_sparse.export(tmp_path / "dense", tmp_path / "in-tree", "reformer")
    with pytest.raises(ConversionError, match="is a dense bert, and only sparse checkpoints are exported"):
        hf_sparse.export(tmp_path / "dense", tmp_path / "in-tree", "longformer")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        hf_sparse.export(tmp_path / "empty", tmp_path / "in-tree", "longformer")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WINDOW, verify=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    with pytest.raises(ConversionError, match="exists and is not empty"):
        hf_sparse.export(tmp_path / "sparse", tmp_path / "full", "longformer")
    hf_sparse.export(tmp_path / "sparse", tmp_path / "full", "longformer", overwrite=True)
    assert not (tmp_path / "full/note").exists()


def test_a_difference_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tmp_path, "Bert", "Model", WINDOW)
    before = transformers.LongformerModel.save_pretrained

    def spoil(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.encoder.layer[0].attention.self.value_global.weight.zero_()
        before(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LongformerModel, "save_pretrained", spoil)
    with pytest.raises(ConversionError, match="with the same pattern, so nothing was kept"):
        hf_sparse.export(tmp_path / "sparse", tmp_path / "in-tree", "longformer")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "sparse"}


def test_the_command(tmp_path: Path) -> None:
    convert(tmp_path, "Bert", "ForMaskedLM", WINDOW)
    call = ["export", str(tmp_path / "sparse"), str(tmp_path / "in-tree"), "--to", "longformer"]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["architecture"] == "LongformerForMaskedLM"
    drawn = CliRunner().invoke(app, [*call, "--overwrite"])
    assert drawn.exit_code == 0, drawn.output
    assert "LongformerForMaskedLM" in drawn.output
