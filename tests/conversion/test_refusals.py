"""Bad input: each fault is named with a way out, and nothing is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_sparse
from hf_sparse import ConversionError, PushError, UnsupportedModelError
from tests.support.checkpoints import edit_json, tree, write_checkpoint
from tests.support.models import tiny_config

BAND = hf_sparse.pattern("band", radius=8)
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """The folder that is to hold the destination, and in which nothing may appear."""
    folder = tmp_path / "room"
    folder.mkdir()
    return folder


def assert_refused(source: Any, room: Path, wants: type[Exception], *parts: str, **options: Any) -> None:
    """Check that a conversion is refused with a message that holds all parts, and leaves nothing behind."""
    pattern = options.pop("pattern", BAND)
    before = tree(Path(source)) if Path(source).is_dir() else {}
    with pytest.raises(wants) as caught:
        hf_sparse.convert(source, room / "sparse", pattern, **options)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert list(room.iterdir()) == []
    assert (tree(Path(source)) if Path(source).is_dir() else {}) == before


def test_a_source_that_is_not_there(room: Path) -> None:
    assert_refused(room.parent / "nowhere", room, ConversionError, "nowhere is not a checkpoint", "no such folder")


def test_a_source_that_is_a_file(bert: Path, room: Path) -> None:
    assert_refused(bert / "config.json", room, ConversionError, "is a file; pass the folder")


def test_an_id_of_the_hub_that_cannot_be_had_offline(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused("nobody/nothing", room, ConversionError, "nobody/nothing is no local folder", "unset HF_HUB_OFFLINE")


def test_a_readme_that_is_no_text(bert: Path, room: Path) -> None:
    (bert / "README.md").write_bytes(b"\xff")
    assert_refused(bert, room, ConversionError, "README.md is not UTF-8 text", "save it as UTF-8")


def test_a_push_that_cannot_be_made_is_found_first(bert: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(bert, room, PushError, "nothing can be pushed to", "unset", push_to="ada/sparse")
    assert_refused(bert, room, ValueError, "such as 'user/name'; got 'sparse'", push_to="sparse")
    assert_refused(bert, room, ValueError, "private is for what is pushed", private=True)


def test_a_checkpoint_that_was_converted_with_code_is_sparse_already(bert: Path, room: Path) -> None:
    hf_sparse.convert(bert, room.parent / "made", BAND, remote_code=True, verify=False)
    assert_refused(room.parent / "made", room, ConversionError, "is sparse already (model_type 'sparse_bert')")


def test_a_revision_of_a_local_folder(bert: Path, room: Path) -> None:
    assert_refused(bert, room, ConversionError, "revision 'main' is for the Hub", revision="main")


def test_a_folder_without_a_config(bert: Path, room: Path) -> None:
    (bert / "config.json").unlink()
    assert_refused(bert, room, ConversionError, "is not a checkpoint", "holds no config.json")
    (bert / "adapter_config.json").write_text("{}")
    assert_refused(bert, room, ConversionError, "merge the adapter")


def test_a_config_that_is_not_json(bert: Path, room: Path) -> None:
    (bert / "config.json").write_text('{"model_type": "bert",')
    assert_refused(bert, room, ConversionError, "config.json is not valid JSON")
    (bert / "config.json").write_text("[]")
    assert_refused(bert, room, ConversionError, "must hold a JSON object, got list")


def test_a_config_with_a_field_of_a_wrong_type(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", num_hidden_layers="many")
    assert_refused(bert, room, ConversionError, "config.json cannot be read as a bert config", "num_hidden_layers")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_type": ["bert"]}, "model_type has to be a text and architectures a list of texts"),
        ({"architectures": 5}, "model_type has to be a text and architectures a list of texts"),
        ({"architectures": [5]}, "model_type has to be a text and architectures a list of texts"),
        ({"quantization_config": {}}, "is quantized (quantization_config in config.json)"),
        ({"hidden_act": "nope"}, "describes no bert that can be made (KeyError: 'nope')"),
        ({"num_attention_heads": 0}, "describes no bert that can be made (ZeroDivisionError"),
        ({"hidden_size": -32}, "describes no bert that can be made (RuntimeError"),
    ],
)
def test_a_config_that_makes_no_sense(bert: Path, room: Path, fields: dict[str, Any], says: str) -> None:
    edit_json(bert / "config.json", **fields)
    assert_refused(bert, room, ConversionError, says)


def test_an_attention_that_a_config_names_is_not_needed(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", attn_implementation="flash_attention_2")
    assert hf_sparse.convert(bert, room / "sparse", BAND).wide_open_difference is not None
    assert "attn_implementation" not in json.loads((room / "sparse/config.json").read_text())


def test_an_adapter_beside_the_weights(bert: Path, room: Path) -> None:
    (bert / "adapter_config.json").write_text("{}")
    (bert / "adapter_model.safetensors").write_bytes(b"x")
    assert_refused(bert, room, ConversionError, "holds an adapter (adapter_config.json)", "merge it into its model")


@pytest.mark.parametrize("fields", [{"weight_map": {"a": 3}}, {"weight_map": {"a": None}}, {"metadata": "x"}])
def test_an_index_of_something_else(bert: Path, room: Path, fields: dict[str, Any]) -> None:
    edit_json(bert / "model.safetensors.index.json", **fields)
    assert_refused(bert, room, ConversionError, "has no weight_map from tensors to files, or metadata that is none")


def test_modules_that_are_none(bert: Path, room: Path) -> None:
    (bert / "modules.json").write_text("[5]")
    assert_refused(bert, room, ConversionError, "does not list modules as objects")


def test_a_folder_without_weights(bert: Path, room: Path) -> None:
    for path in bert.glob("model*"):
        path.unlink()
    assert_refused(bert, room, ConversionError, "holds no weights", "model.safetensors")


def test_weights_that_are_only_a_pickle(bert: Path, room: Path) -> None:
    for path in bert.glob("model*"):
        path.unlink()
    torch.save({}, bert / "pytorch_model.bin")
    assert_refused(bert, room, ConversionError, "only as pytorch_model.bin", "a pickle may run code", "save_pretrained")


def test_shards_without_an_index(bert: Path, room: Path) -> None:
    (bert / "model.safetensors.index.json").unlink()
    assert_refused(bert, room, ConversionError, f"has {SHARD} but no model.safetensors.index.json")


def test_a_missing_shard(bert: Path, room: Path) -> None:
    (bert / SHARD).unlink()
    assert_refused(bert, room, ConversionError, f"lacks the shard {SHARD}")


def test_an_index_that_names_a_tensor_its_shard_lacks(bert: Path, room: Path) -> None:
    index = json.loads((bert / "model.safetensors.index.json").read_text())
    index["weight_map"]["bert.more.weight"] = SHARD
    edit_json(bert / "model.safetensors.index.json", **index)
    assert_refused(bert, room, ConversionError, f"{SHARD} lacks bert.more.weight, which the index says it holds")


def test_an_index_that_leads_out_of_the_folder(bert: Path, room: Path) -> None:
    edit_json(bert / "model.safetensors.index.json", weight_map={"a": "../x.safetensors"})
    assert_refused(bert, room, ConversionError, "lacks the shard ../x.safetensors")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: raw[: len(raw) // 2], "and the file has"),
        (lambda raw: raw[:-1], "and the file has"),
        (lambda raw: raw + b"x", "and the file has"),
        (lambda raw: raw[:40], "its header alone needs"),
        (lambda raw: raw[:5], "its header claims"),
        (lambda raw: b"", "its header claims 0 bytes"),
        (lambda raw: b"\xff" * 8 + raw[8:], "its header claims"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "its header cannot be read"),
        (lambda raw: raw.replace(b'"data_offsets"', b'"data_offzets"', 1), "its header cannot be read"),
        (lambda raw: raw.replace(b'"shape":[32', b'"shape":[31', 1), "does not have the bytes of its shape"),
        (lambda raw: raw.replace(b'"dtype":"F32"', b'"dtype":"F13"', 1), "is of an unknown type, F13"),
        (lambda raw: raw.replace(b'{"format":"pt"}', b'{"format":1234}', 1), "its notes are no texts"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "its header claims"),
    ],
)
@pytest.mark.parametrize("at", [0, 1])
def test_a_broken_shard(bert: Path, room: Path, spoil: Callable[[bytes], bytes], says: str, at: int) -> None:
    shard = sorted(bert.glob("*.safetensors"))[at]
    shard.write_bytes(spoil(shard.read_bytes()))
    assert_refused(bert, room, ConversionError, f"{shard.name} is truncated or is no safetensors file", says)


def test_code_of_its_own(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", auto_map={"AutoModel": "modeling_mine.MyModel"})
    assert_refused(bert, room, ConversionError, "brings code of its own (auto_map in config.json", "trust_remote_code")
    edit_json(bert / "config.json", auto_map=None)
    edit_json(bert / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})
    assert_refused(bert, room, ConversionError, "auto_map in tokenizer_config.json")


def test_a_quantized_source(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert_refused(bert, room, ConversionError, "is quantized", "convert the checkpoint it was made from")


def test_a_source_that_is_sparse_already(bert: Path, room: Path, tmp_path: Path) -> None:
    hf_sparse.convert(bert, tmp_path / "once", BAND, verify=False)
    assert_refused(tmp_path / "once", room, ConversionError, "is sparse already (model_type 'sparse_bert')")


@pytest.mark.parametrize("name", ["MPNet", "DebertaV2", "XLNet"])
def test_a_model_type_that_would_ignore_a_pattern(name: str, room: Path, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(vocab_size=64)
    config.architectures = [f"{name}Model"]
    config.save_pretrained(tmp_path / "dense")
    save_file({"a": torch.zeros(2)}, tmp_path / "dense/model.safetensors")
    reason = "does not go through transformers' attention interface"
    assert_refused(
        tmp_path / "dense",
        room,
        UnsupportedModelError,
        f"({config.model_type})",
        reason,
        "hf-sparse support lists what converts",
    )


def test_a_model_type_that_no_row_tells_about_keeps_its_length(room: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    config = transformers.EsmConfig(vocab_size=64, pad_token_id=1, max_position_embeddings=80, **sizes)
    transformers.EsmModel(config).save_pretrained(tmp_path / "dense")
    reason = "esm keeps its length of 80 tokens"
    assert_refused(tmp_path / "dense", room, ValueError, reason, "leave max_length out", max_length=200)


def test_a_model_type_made_of_several_models(room: Path, tmp_path: Path) -> None:
    transformers.CLIPConfig().save_pretrained(tmp_path / "dense")
    save_file({"a": torch.zeros(2)}, tmp_path / "dense/model.safetensors")
    assert_refused(tmp_path / "dense", room, UnsupportedModelError, "'clip' is made of several models", "convert that")


def test_a_model_type_that_transformers_does_not_know(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", model_type="bart_simpson")
    assert_refused(bert, room, UnsupportedModelError, "names the model type 'bart_simpson'", "hf-sparse support lists")
    edit_json(bert / "config.json", model_type=None)
    assert_refused(bert, room, UnsupportedModelError, "names no model_type")


def test_positions_that_transformers_no_longer_computes(bert: Path, room: Path) -> None:
    edit_json(bert / "config.json", position_embedding_type="relative_key")
    assert_refused(bert, room, UnsupportedModelError, "position_embedding_type 'relative_key'")


def test_a_length_shorter_than_the_checkpoint_s(bert: Path, room: Path) -> None:
    assert_refused(bert, room, ValueError, "max_length 127 is shorter than the 128 tokens", max_length=127)
    assert_refused(bert, room, TypeError, "max_length must be a whole number of tokens, got '300'", max_length="300")


@pytest.mark.parametrize("key", ["bigbird", "block_local", "random"])
def test_a_block_larger_than_the_length(bert: Path, room: Path, key: str) -> None:
    large = hf_sparse.pattern(key, block_size=257)
    assert_refused(bert, room, ValueError, "block_size 257", "256", pattern=large, max_length=256)
    assert_refused(bert, room, ValueError, "block_size 257", "256", layers={1: large}, max_length=256)


def test_an_unknown_layer_and_a_layer_that_is_no_pattern(bert: Path, room: Path) -> None:
    assert_refused(bert, room, ValueError, "unknown layer '2'; known: 0, 1", layers={"2": "dense"})
    assert_refused(bert, room, TypeError, "layers['1'] must be a pattern or 'dense', got 'thin'", layers={"1": "thin"})


def test_a_pattern_that_does_not_fit_or_is_none(bert: Path, room: Path) -> None:
    assert_refused(bert, room, ValueError, "the model has 2", pattern=hf_sparse.pattern("longformer", window=(8, 8, 8)))
    assert_refused(bert, room, TypeError, "pattern must be a pattern", pattern="band")


def test_weights_that_do_not_fit_the_config(bert: Path, room: Path, tmp_path: Path) -> None:
    says = "has shape [128, 32], but by config.json it has [512, 32]"
    edit_json(bert / "config.json", max_position_embeddings=512)
    assert_refused(bert, room, ConversionError, f"position_embeddings.weight {says}")
    edit_json(bert / "config.json", max_position_embeddings=128, vocab_size=65)
    assert_refused(bert, room, ConversionError, "has shape [64, 32], but by config.json it has [65, 32]")
    write_checkpoint(tmp_path / "part")
    held = load_file(tmp_path / "part/model.safetensors")
    part = {name: held[name] for name in held if "query" not in name}
    save_file(part, tmp_path / "part/model.safetensors")
    says = "lacks the tensor encoder.layer.0.attention.self.query.weight and 3 more; it is not a whole BertModel"
    assert_refused(tmp_path / "part", room, ConversionError, says)


def test_a_destination_that_is_not_empty(bert: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"exists and is not empty; choose another, or pass overwrite=True"):
        hf_sparse.convert(bert, made, BAND)
    assert tree(made) == {"mine.txt": b"mine"}
    hf_sparse.convert(bert, made, BAND, overwrite=True, verify=False)
    assert "mine.txt" not in tree(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert", "made"]


def test_an_empty_destination_is_filled(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    hf_sparse.convert(bert, tmp_path / "made", BAND, verify=False)
    assert "model.safetensors.index.json" in tree(tmp_path / "made")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_destination_in_around_or_equal_to_the_source(bert: Path, tmp_path: Path, overwrite: bool) -> None:
    before = tree(bert)
    link = tmp_path / "link"
    link.symlink_to(bert)
    for wanted, says in [
        (bert, "lies in the source"),
        (link, "lies in the source"),
        (bert / "sparse", "lies in the source"),
        (bert.parent, "holds the source"),
    ]:
        with pytest.raises(ConversionError, match=says):
            hf_sparse.convert(bert, wanted, BAND, overwrite=overwrite)
    assert tree(bert) == before


def test_a_destination_that_is_a_file_or_has_no_folder_to_lie_in(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="is a file; choose a folder"):
        hf_sparse.convert(bert, tmp_path / "file", BAND, overwrite=True)
    with pytest.raises(ConversionError, match="does not exist; make it first"):
        hf_sparse.convert(bert, tmp_path / "no/sparse", BAND)
    assert not (tmp_path / "no").exists()


def test_a_folder_that_may_not_be_written(bert: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode & os.W_OK == 0 and access(path, mode))
    assert_refused(bert, room, ConversionError, "may not be written")


def test_a_file_that_may_not_be_read(bert: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "tokenizer.json")
    assert_refused(bert, room, ConversionError, "tokenizer.json may not be read")


def test_the_current_folder_is_not_replaced(bert: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (room / "mine.txt").write_text("mine")
    monkeypatch.chdir(room)
    with pytest.raises(ConversionError, match="is the current folder, which would be replaced; choose one in it"):
        hf_sparse.convert(bert, room, BAND, overwrite=True)
    assert tree(room) == {"mine.txt": b"mine"}


def test_a_disk_that_is_too_small(bert: Path, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(room)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_refused(bert, room, ConversionError, "will write 0.1 MB", "0.0 MB free", "on another disk")


def test_a_tokenizer_file_that_is_not_json(bert: Path, room: Path) -> None:
    (bert / "tokenizer.json").write_text("{")
    assert_refused(bert, room, ConversionError, "tokenizer.json is not valid JSON", max_length=300)


def test_a_roberta_whose_padding_is_unknown(room: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Roberta")
    held = tiny_config("Roberta").to_dict()
    (tmp_path / "dense/config.json").write_text(json.dumps({**held, "pad_token_id": None}))
    assert_refused(tmp_path / "dense", room, ConversionError, "pad_token_id must be a number, got None")
