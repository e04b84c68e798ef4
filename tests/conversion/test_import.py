"""Sparse checkpoints of transformers' own classes as sources: those classes, which nobody here wrote, are the oracles."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

import hf_sparse
from hf_sparse.conversion import in_tree
from hf_sparse.conversion.shards import StoredTensor
from hf_sparse.errors import ConversionError, UnsupportedModelError
from tests.support.checkpoints import edit_json, write_tokenizer
from tests.support.in_tree import AS_DENSE, HEADS, read_by, write_in_tree
from tests.support.models import tiny_batch

TOLERANCE = 1e-5
CASES = [(family, head) for family, heads in HEADS.items() for head in heads]
BIGBIRD = {"block_size": 8, "num_random_blocks": 2, "length": "padded"}


def sparse_of(folder: Path, family: str, head: str) -> PreTrainedModel:
    """Load what a checkpoint became, by the Auto class of its head."""
    task = {"ForConditionalGeneration": "ForSeq2SeqLM", "Model": ""}.get(head, head)
    model: PreTrainedModel = getattr(transformers, f"AutoModel{task}").from_pretrained(folder)
    assert type(model).__name__ == f"Sparse{AS_DENSE[family]}{head}"
    return model.eval()


def batch_of(family: str, tokens: int, *, padding: int = 21) -> dict[str, Tensor]:
    """Return a batch, three of whose tokens are global where the family has such."""
    batch = tiny_batch(tokens, padding=padding)
    if family in ("Longformer", "LED"):
        batch["global_attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["global_attention_mask"][:, [0, 3, 40]] = 1
    return batch


@pytest.mark.parametrize(("family", "head"), CASES)
def test_every_class_says_the_same_as_before(tmp_path: Path, family: str, head: str) -> None:
    theirs = write_in_tree(tmp_path / "in-tree", family, head)
    report = hf_sparse.convert(tmp_path / "in-tree", tmp_path / "sparse")
    assert report.imported_from == f"{family}{head}"
    assert (report.added.tensors, report.dropped.tensors) == (0, 0)
    assert report.wide_open_difference is not None
    assert report.wide_open_difference < TOLERANCE
    ours = sparse_of(tmp_path / "sparse", family, head)
    # in training mode BigBird has its random blocks
    training = family.startswith("BigBird")
    for tokens in (112, 200):
        batch = batch_of(family, tokens)
        want, got = read_by(theirs, batch, training=training), read_by(ours, batch)
        assert want.abs().max() > 0.1
        assert (want - got).abs().max() <= TOLERANCE


@pytest.mark.parametrize("family", ["BigBird", "BigBirdPegasus"])
def test_the_evaluation_plan_says_what_the_class_says_in_evaluation(tmp_path: Path, family: str) -> None:
    theirs = write_in_tree(tmp_path / "in-tree", family)
    pattern = hf_sparse.pattern("bigbird", **BIGBIRD, random_plan="evaluation")
    layers = {f"decoder.{i}": "dense" for i in range(3)} if family == "BigBirdPegasus" else {}
    report = hf_sparse.convert(tmp_path / "in-tree", tmp_path / "sparse", pattern, layers=layers)
    assert report.wide_open_difference is not None
    assert report.wide_open_difference < TOLERANCE
    assert "training" not in report.wide_open_note
    ours = AutoModel.from_pretrained(tmp_path / "sparse").eval()
    batch = batch_of(family, 200)
    want, trained = read_by(theirs, batch), read_by(theirs, batch, training=True)
    assert (want - read_by(ours, batch)).abs().max() <= TOLERANCE
    # the two modes of that class are two different models
    assert (want - trained).abs().max() > 100 * TOLERANCE


def test_a_task_head_marks_the_same_tokens_by_itself(tmp_path: Path) -> None:
    for head in ("ForSequenceClassification", "ForQuestionAnswering"):
        theirs = write_in_tree(tmp_path / head, "Longformer", head)
        hf_sparse.convert(tmp_path / head, tmp_path / f"{head}-sparse", verify=False)
        ours = sparse_of(tmp_path / f"{head}-sparse", "Longformer", head)
        batch = tiny_batch(60)
        # the class expects three separators in each row
        for row in range(2):
            batch["input_ids"][row, [7, 40]] = 2
        assert (read_by(theirs, batch) - read_by(ours, batch)).abs().max() <= TOLERANCE


def test_led_writes_the_same_text(tmp_path: Path) -> None:
    theirs = write_in_tree(tmp_path / "led", "LED", "ForConditionalGeneration")
    hf_sparse.convert(tmp_path / "led", tmp_path / "sparse", verify=False)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    batch = batch_of("LED", 100)
    asked: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 2}
    # weights at random would say one word again and again
    asked["repetition_penalty"] = 5.0
    want, got = theirs.generate(**batch, **asked), ours.generate(**batch, **asked)
    assert len(set(want[0].tolist())) > 3
    assert torch.equal(want, got)


def test_a_decoder_with_fewer_positions_repeats_them(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "led", "LED")
    report = hf_sparse.convert(tmp_path / "led", tmp_path / "sparse", max_length=300)
    assert (report.max_length_before, report.max_length) == (208, 300)
    before = load_file(tmp_path / "led/model.safetensors")
    after = load_file(tmp_path / "sparse/model.safetensors")
    for stack, own in (("encoder", 208), ("decoder", 50)):
        held, table = before[f"{stack}.embed_positions.weight"], after[f"{stack}.embed_positions.weight"]
        assert (len(held), len(table)) == (own, 302)
        # BART's first two rows are read by no position; what was as long as the encoder's table repeats as a whole
        assert torch.equal(table[2:], held[torch.arange(300) % 208 % own])


def test_the_config_is_that_of_the_dense_type(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "led", "LED", "ForConditionalGeneration", attention_window=16, dropout=0.25)
    report = hf_sparse.convert(tmp_path / "led", tmp_path / "sparse", verify=False)
    held = json.loads((tmp_path / "sparse/config.json").read_text())
    assert held["model_type"] == "sparse_bart"
    assert held["architectures"] == ["SparseBartForConditionalGeneration"]
    assert (held["dropout"], held["max_position_embeddings"], held["decoder_start_token_id"]) == (0.25, 208, 2)
    assert not {"attention_window", "max_encoder_position_embeddings", "max_decoder_position_embeddings"} & held.keys()
    assert report.pattern == hf_sparse.pattern("longformer", window=16).to_dict()
    assert report.layers == dict.fromkeys(("decoder.0", "decoder.1", "decoder.2"), "dense")
    assert "from the `LEDForConditionalGeneration` of `led`" in (tmp_path / "sparse/README.md").read_text()


def test_a_checkpoint_as_it_was_published(tmp_path: Path) -> None:
    """Published ones are pickles, have buffers of older versions, and fields that the class no longer reads."""
    folder = tmp_path / "published"
    theirs = write_in_tree(folder, "Longformer", "ForMaskedLM", attention_window=[16, 16])
    write_tokenizer(folder, "Roberta")
    edit_json(folder / "tokenizer_config.json", tokenizer_class=None)
    weights = load_file(folder / "model.safetensors")
    weights["longformer.embeddings.position_ids"] = torch.arange(210)[None]
    weights["lm_head.decoder.weight"] = weights["longformer.embeddings.word_embeddings.weight"].clone()
    weights["lm_head.decoder.bias"] = weights["lm_head.bias"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    own = {"attention_mode": "longformer", "attention_dilation": [1, 1], "autoregressive": False}
    edit_json(folder / "config.json", **own, ignore_attention_mask=False, gradient_checkpointing=False)
    report = hf_sparse.convert(folder, tmp_path / "sparse", allow_pickle=True)
    assert report.dropped.tensors == 1
    assert report.pattern == hf_sparse.pattern("longformer", window=16).to_dict()
    ours = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse").eval()
    batch = batch_of("Longformer", 111)
    assert (read_by(theirs, batch) - read_by(ours, batch)).abs().max() <= TOLERANCE
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse")("a").input_ids


def test_shards_and_half_precision_come_along(tmp_path: Path) -> None:
    model = write_in_tree(tmp_path / "whole", "LED", "ForConditionalGeneration").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    hf_sparse.convert(tmp_path / "shards", tmp_path / "sparse", verify=False)
    index = json.loads((tmp_path / "sparse/model.safetensors.index.json").read_text())
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16).eval()
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for path in (tmp_path / "sparse").glob("*.safetensors") for tensor in load_file(path).values()
    )
    own, other = ours.state_dict(), model.state_dict()
    key = "encoder.layers.1.self_attn."
    assert torch.equal(
        own[f"model.{key}sparse_state.value.weight"], other[f"led.{key}longformer_self_attn.value_global.weight"]
    )


def test_another_pattern_drops_what_it_does_not_own(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "longformer", "Longformer", "ForMaskedLM")
    report = hf_sparse.convert(tmp_path / "longformer", tmp_path / "band", hf_sparse.pattern("band", radius=4))
    # three projections of two layers, each with a bias
    assert report.dropped.tensors == 12
    assert report.wide_open_difference is None
    assert report.wide_open_note == "not compared: the pattern is not that of the longformer that it was"
    AutoModelForMaskedLM.from_pretrained(tmp_path / "band")
    # a wider window keeps them
    wider = hf_sparse.pattern("longformer", window=32)
    report = hf_sparse.convert(tmp_path / "longformer", tmp_path / "wider", wider)
    assert (report.dropped.tensors, report.added.tensors) == (0, 0)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("longformer", "wider"))
    key = "encoder.layer.0.attention.self"
    assert torch.equal(after[f"roberta.{key}.sparse_state.key.weight"], before[f"longformer.{key}.key_global.weight"])


def test_weights_that_went_astray_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_in_tree(tmp_path / "longformer", "Longformer")
    kin = in_tree.KIN["longformer"]
    swapped = (r"\.attention\.self\.query_global\.", ".attention.self.value_global.")
    back = (r"\.attention\.self\.value_global\.", ".attention.self.query_global.")

    class Astray(in_tree.Kin):
        def dense_tensors(self, tensor: StoredTensor, config: Any) -> Iterator[StoredTensor]:
            name = tensor.name
            for old, new in (swapped, back):
                if old.replace("\\", "") in name:
                    name = name.replace(old.replace("\\", ""), new)
                    break
            for made in super().dense_tensors(tensor, config):
                yield dataclasses.replace(made, name=kin.dense_name(name))

    wrong = Astray(**{field.name: getattr(kin, field.name) for field in dataclasses.fields(kin)})
    monkeypatch.setitem(in_tree.KIN, "longformer", wrong)
    with pytest.raises(ConversionError, match="with the same pattern, so nothing was kept"):
        hf_sparse.convert(tmp_path / "longformer", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("family", "head", "said"),
    [
        ("Longformer", "ForMaskedLM", None),
        ("BigBird", "ForSequenceClassification", "a Bert has no head like it; save its base model alone"),
        ("BigBird", "ForQuestionAnswering", "a Bert has no head like it"),
        ("BigBirdPegasus", "ForSequenceClassification", "a Pegasus has no head like it"),
    ],
)
def test_heads_that_the_dense_type_has_not_are_refused(
    tmp_path: Path, family: str, head: str, said: str | None
) -> None:
    write_in_tree(tmp_path / "in-tree", family, head)
    if said is None:
        hf_sparse.convert(tmp_path / "in-tree", tmp_path / "sparse", verify=False)
        return
    with pytest.raises(UnsupportedModelError, match=said):
        hf_sparse.convert(tmp_path / "in-tree", tmp_path / "sparse")
    # the way out that the message names
    getattr(transformers, f"{family}Model").from_pretrained(tmp_path / "in-tree").save_pretrained(tmp_path / "base")
    report = hf_sparse.convert(tmp_path / "base", tmp_path / "sparse")
    assert report.imported_from == f"{family}Model"


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "scaled", "BigBird", rescale_embeddings=True)
    with pytest.raises(UnsupportedModelError, match="rescale_embeddings is True, only False can be"):
        hf_sparse.convert(tmp_path / "scaled", tmp_path / "sparse")
    write_in_tree(tmp_path / "full", "BigBird", attention_type="original_full")
    with pytest.raises(ValueError, match="is a big_bird that attends fully, so a pattern is needed"):
        hf_sparse.convert(tmp_path / "full", tmp_path / "sparse")
    band = hf_sparse.pattern("band", radius=4)
    assert hf_sparse.convert(tmp_path / "full", tmp_path / "band", band).wide_open_difference is None
    write_in_tree(tmp_path / "pegasus", "BigBirdPegasus")
    with pytest.raises(ValueError, match="learned positions of a bigbird_pegasus cannot be lengthened, got 512"):
        hf_sparse.convert(tmp_path / "pegasus", tmp_path / "sparse", max_length=512)
    write_in_tree(tmp_path / "longformer", "Longformer")
    (tmp_path / "text").write_text("a word")
    routing = hf_sparse.pattern("routing", num_clusters=2)
    with pytest.raises(ConversionError, match=r"calibrate needs a dense source, and .* is a longformer"):
        hf_sparse.convert(tmp_path / "longformer", tmp_path / "sparse", routing, calibrate=tmp_path / "text")
    with pytest.raises(ConversionError, match=r"needs a dense source, and .* is a longformer"):
        hf_sparse.plan_layers(tmp_path / "longformer", tmp_path / "text", 0.5)
    assert not (tmp_path / "sparse").exists()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "led", "LED")
    path = tmp_path / "led/model.safetensors"
    weights = load_file(path)
    del weights["encoder.layers.0.self_attn.output.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks the tensor encoder\.layers\.0\.self_attn\.out_proj\.weight"):
        hf_sparse.convert(tmp_path / "led", tmp_path / "sparse")


def test_short_texts_are_not_compared_where_the_class_attends_fully(tmp_path: Path) -> None:
    write_in_tree(tmp_path / "short", "BigBird", max_position_embeddings=64)
    report = hf_sparse.convert(tmp_path / "short", tmp_path / "sparse")
    assert report.wide_open_difference is None
    assert report.wide_open_note == "not compared: up to 72 tokens BigBirdModel attends fully"
