"""Decoders, converted: which numbers move, that nothing else changes, and that what comes out generates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_sparse
from hf_sparse import UnsupportedModelError
from hf_sparse.conversion import Count
from tests.support.checkpoints import edit_json
from tests.support.decoders import tiny_decoder, tiny_prompts

SINKS = hf_sparse.pattern("longformer", window=8, global_tokens=(0,), global_projections=False)
LENGTH = 150
# family, what its position table is called, the rows before position 0, and what its config calls the length
TABLES = [
    ("GPT2", "transformer.wpe.weight", 0, "n_positions"),
    ("OPT", "model.decoder.embed_positions.weight", 2, "max_position_embeddings"),
]
DECODERS = [*(family for family, *_ in TABLES), "GPTNeoX", "Llama", "Mistral", "Qwen2", "Qwen3"]
HEADS = [
    (family, head)
    for family in DECODERS
    for head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
    if hasattr(transformers, f"{family}{head}")
]


def write_decoder(folder: Path, family: str, head: str | None = None) -> PreTrainedModel:
    """Save a tiny random decoder of 64 positions, and return it."""
    model = tiny_decoder(family, head)
    model.save_pretrained(folder)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("family", "table", "offset", "field"), TABLES)
def test_positions_repeat_and_all_else_is_carried(
    tmp_path: Path, family: str, table: str, offset: int, field: str
) -> None:
    write_decoder(tmp_path / "dense", family)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH)
    before, after = weights(tmp_path / "dense"), weights(tmp_path / "sparse")
    assert after.keys() == before.keys()
    for row in range(LENGTH + offset):
        origin = row if row < offset else offset + (row - offset) % 64
        assert torch.equal(after[table][row], before[table][origin]), row
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {table})
    assert (report.tiled, report.max_length_before, report.max_length) == (Count(1, after[table].numel()), 64, LENGTH)
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert config[field] == LENGTH
    assert AutoModel.from_pretrained(tmp_path / "sparse").config.max_position_embeddings == LENGTH


@pytest.mark.parametrize("family", DECODERS)
def test_a_causal_model_counts_the_pairs_of_the_causal_pattern(tmp_path: Path, family: str) -> None:
    write_decoder(tmp_path / "dense", family)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH, verify=False)
    assert report.density == pytest.approx(SINKS.mask(LENGTH, is_causal=True).float().mean().item(), rel=1e-6)
    half = hf_sparse.convert(tmp_path / "dense", tmp_path / "half", SINKS, layers={0: "dense"}, verify=False)
    shares = SINKS.density(64, is_causal=True) + 65 / 128
    assert half.density == pytest.approx(shares / 2, rel=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_a_converted_decoder_generates_past_the_length_of_its_source(tmp_path: Path, family: str) -> None:
    write_decoder(tmp_path / "dense", family)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    batch = tiny_prompts(60, padding=5)
    cached = model.generate(**batch, **settings)
    assert cached.shape == (2, 80)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_every_head_converts(tmp_path: Path, family: str, head: str) -> None:
    write_decoder(tmp_path / "dense", family, head)
    edit_json(tmp_path / "dense/config.json", pad_token_id=None)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH)
    assert report.wide_open_difference is not None
    auto = getattr(transformers, f"AutoModel{head.removeprefix('Model')}")
    assert type(auto.from_pretrained(tmp_path / "sparse")).__name__ == f"Sparse{family}{head}"


def test_gpt2_as_it_lies_on_the_hub(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense", "GPT2")
    # names without the prefix, the causal mask of every layer, and no second copy of the embeddings
    held = {name.removeprefix("transformer."): tensor for name, tensor in weights(tmp_path / "dense").items()}
    held |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(2)}
    save_file(held, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "dense/config.json", n_ctx=64)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH)
    assert report.dropped == Count(2, 2 * 64 * 64)
    assert weights(tmp_path / "sparse").keys() == {name for name in held if not name.endswith(".attn.bias")}
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found.values())


def test_a_config_that_names_the_length_twice_keeps_the_new_one(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense", "GPT2")
    edit_json(tmp_path / "dense/config.json", max_position_embeddings=64)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH, verify=False)
    assert "max_position_embeddings" not in json.loads((tmp_path / "sparse/config.json").read_text())
    assert AutoModel.from_pretrained(tmp_path / "sparse").wpe.weight.shape[0] == LENGTH


def test_a_sparse_config_lengthens_gpt2_as_it_loads(tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", "GPT2")
    config = hf_sparse.sparse_config(tmp_path / "dense", SINKS, max_length=LENGTH)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", config=config)
    table, learned = model.transformer.wpe.weight, dense.transformer.wpe.weight
    assert torch.equal(table, learned.repeat(3, 1)[:LENGTH])
    assert model.config.n_positions == LENGTH


def test_the_tokenizer_of_gpt2_reads_the_new_length(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense", "GPT2")
    letters = ["<|endoftext|>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.GPT2Tokenizer(vocab={letter: at for at, letter in enumerate(letters)}, merges=[])
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH, verify=False)
    made = AutoTokenizer.from_pretrained(tmp_path / "sparse")
    assert type(made).__name__ == "GPT2Tokenizer"
    assert len(made("a long page " * 40, truncation=True)["input_ids"]) == LENGTH


@pytest.mark.parametrize("fields", [{"head": "DoubleHeadsModel"}, {"add_cross_attention": True}])
def test_gpt2_with_a_second_head_or_cross_attention_converts(tmp_path: Path, fields: dict[str, Any]) -> None:
    tiny_decoder("GPT2", **fields).save_pretrained(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", SINKS, max_length=LENGTH)
    assert report.wide_open_difference is not None
    made = AutoModel.from_pretrained(tmp_path / "sparse")
    served = {name: module._sparse.pattern for name, module in made.named_modules() if hasattr(module, "_sparse")}
    assert {name for name, pattern in served.items() if pattern == SINKS} == {"h.0.attn", "h.1.attn"}
    assert all(pattern is None for name, pattern in served.items() if "crossattention" in name)


def test_patterns_that_copy_projections_are_refused_with_a_way_out(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense", "GPT2")
    with pytest.raises(UnsupportedModelError, match=r"GPT2Attention has no separate.*set global_projections=False"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern("longformer"))
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize("key", ["routing", "sac", "reformer"])
def test_content_based_patterns_convert_on_a_decoder(tmp_path: Path, key: str) -> None:
    write_decoder(tmp_path / "dense", "GPT2")
    pattern = hf_sparse.pattern(key) | hf_sparse.pattern("band", radius=4)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=LENGTH, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse").eval()
    batch = tiny_prompts(40, padding=0)
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_centroids_that_a_text_sets_are_saved_where_there_is_no_table(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense", "Llama")
    letters = ["<|endoftext|>", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.GPT2Tokenizer(vocab={letter: at for at, letter in enumerate(letters)}, merges=[])
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text").write_text("the river reads a long page " * 30)
    pattern = hf_sparse.pattern("routing", num_clusters=4) | hf_sparse.pattern("band", radius=4)
    report = hf_sparse.convert(
        tmp_path / "dense", tmp_path / "sparse", pattern, calibrate=tmp_path / "text", verify=False
    )
    held = weights(tmp_path / "sparse")
    added = {name for name in held if ".sparse_state." in name}
    assert len(added) == report.added.tensors > 0
    assert all(name.startswith("model.layers.") for name in added)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(found.values())
