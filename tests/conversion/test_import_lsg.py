"""Checkpoints of LSG as sources, by their config and names of weights; the oracle is loops in float64 over the dense model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

import hf_sparse
from hf_sparse.errors import ConversionError
from tests.support.checkpoints import write_checkpoint
from tests.support.decoders import BART
from tests.support.lsg_rules import decoded_by_lsg, read_by_lsg
from tests.support.models import tiny_batch

TOLERANCE = 1e-5
# as LSG writes them
LSG: dict[str, Any] = {
    "adaptive": True,
    "base_model_prefix": "lsg",
    "block_size": 8,
    "lsh_num_pre_rounds": 1,
    "mask_first_token": False,
    "num_global_tokens": 3,
    "pool_with_global": True,
    "sparse_block_size": 8,
    "sparsity_factor": 2,
    "sparsity_type": "norm",
}
SIZES: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 24, "num_hidden_groups": 2},
    "Electra": {"embedding_size": 24},
    "Bart": BART,
    "MBart": BART,
}


def write_lsg(folder: Path, family: str = "Roberta", head: str = "Model", **fields: Any) -> tuple[Any, Tensor]:
    """Save a tiny checkpoint as LSG does, and return its base model in float64 and its table of global tokens."""
    sizes = SIZES.get(family, {})
    dense = write_checkpoint(folder, family, head, positions=210, **sizes)
    table = 0.3 * torch.randn(512, sizes.get("embedding_size", 32), generator=torch.Generator().manual_seed(2))
    weights = load_file(folder / "model.safetensors")
    prefix = "" if head == "Model" else f"{dense.base_model_prefix}."
    where = "encoder." if dense.config.is_encoder_decoder else "embeddings."
    save_file(
        {**weights, f"{prefix}{where}global_embeddings.weight": table}, folder / "model.safetensors", {"format": "pt"}
    )
    module = f"modeling_lsg_{family.lower()}"
    own = {"architectures": [f"LSG{family}{head}"], "auto_map": {"AutoModel": f"{module}.LSG{family}Model"}}
    held = json.loads((folder / "config.json").read_text())
    passes = {"pass_global_tokens_to_decoder": True} if dense.config.is_encoder_decoder else {}
    (folder / "config.json").write_text(json.dumps({**held, **LSG, **passes, **own, **fields}))
    (folder / f"{module}.py").write_text("raise ImportError")
    return getattr(dense, dense.base_model_prefix, dense).double().eval(), table


def settings_of(**fields: Any) -> dict[str, Any]:
    held = {**LSG, **fields}
    if held["sparsity_type"] is None or not held["sparse_block_size"] or not held["sparsity_factor"]:
        held |= {"sparsity_type": "none", "sparsity_factor": 1, "sparse_block_size": 1}
    return held


CASES: dict[str, dict[str, Any]] = {
    "norm": {},
    "norm, narrow": {"sparse_block_size": 8, "block_size": 16},
    "pooling": {"sparsity_type": "pooling"},
    "stride": {"sparsity_type": "stride", "sparsity_factor": 4},
    "block_stride": {"sparsity_type": "block_stride"},
    "none": {"sparsity_type": "none"},
    "no type": {"sparsity_type": None},
    "no sparse block": {"sparse_block_size": 0},
    "no factor": {"sparsity_factor": 0},
    "one global token": {"num_global_tokens": 1},
    "not pooled": {"pool_with_global": False},
}


FAMILIES = ("Bert", "Roberta", "Camembert", "XLMRoberta", "DistilBert", "Electra", "Albert")


@pytest.mark.parametrize(
    ("family", "name"), [*(("Roberta", name) for name in CASES), *((family, "norm") for family in FAMILIES)]
)
def test_it_says_what_lsg_says(tmp_path: Path, family: str, name: str) -> None:
    fields = CASES[name]
    dense, table = write_lsg(tmp_path / "lsg", family, **fields)
    report = hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    assert report.imported_from == f"LSG{family}Model"
    assert (report.added.tensors, report.dropped.tensors) == (0, 0)
    ours = AutoModel.from_pretrained(tmp_path / "sparse").eval()
    # the second text is padded, by no whole block
    batch = tiny_batch(90, padding=23)
    with torch.no_grad():
        said = ours(**batch).last_hidden_state
    for row, real in ((0, 90), (1, 67)):
        want = read_by_lsg(dense, table, batch["input_ids"][row, :real], settings_of(**fields))
        assert want.abs().max() > 1
        assert (said[row, :real] - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("fields", [{}, {"pass_global_tokens_to_decoder": False}, {"num_global_tokens": 1}])
@pytest.mark.parametrize("family", ["Bart", "MBart"])
def test_a_decoder_reads_what_it_reads_in_lsg(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    dense, table = write_lsg(tmp_path / "lsg", family, "ForConditionalGeneration", **fields)
    settings = {**LSG, "pass_global_tokens_to_decoder": True, **fields}
    report = hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    assert (report.added.tensors, report.dropped.tensors) == (0, 0)
    ours = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    batch, decoder_ids = tiny_batch(90, padding=23), tiny_batch(12, padding=0, seed=1)["input_ids"]
    with torch.no_grad():
        said = ours.model(**batch, decoder_input_ids=decoder_ids)
        for row, real in ((0, 90), (1, 67)):
            ids = batch["input_ids"][row, :real]
            want = decoded_by_lsg(dense, table, ids, decoder_ids[row], settings)
            assert want.abs().max() > 1
            assert (said.last_hidden_state[row] - want).abs().max() <= TOLERANCE
    nodes = settings["num_global_tokens"] if settings["pass_global_tokens_to_decoder"] else 0
    assert said.encoder_last_hidden_state.shape[1] == 90 + nodes


def test_where_no_decoder_reads_them_the_first_one_is_pooled_everywhere(tmp_path: Path) -> None:
    dense, table = write_lsg(tmp_path / "lsg", "Bart", "Model", pass_global_tokens_to_decoder=False)
    hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    ours = AutoModel.from_pretrained(tmp_path / "sparse").eval()
    ids = tiny_batch(90, padding=0)["input_ids"]
    want = read_by_lsg(dense, table, ids[0], LSG)
    with torch.no_grad():
        said = ours.encoder(input_ids=ids, output_hidden_states=True)
        as_tuple = ours.encoder(input_ids=ids, return_dict=False)
    for found in (said.last_hidden_state, said.hidden_states[-1], as_tuple[0]):
        assert (found[0] - want).abs().max() <= TOLERANCE
    bert, table = write_lsg(tmp_path / "bert")
    hf_sparse.convert(tmp_path / "bert", tmp_path / "other")
    with torch.no_grad():
        first = AutoModel.from_pretrained(tmp_path / "other").eval()(input_ids=ids, return_dict=False)[0]
    assert (first[0] - read_by_lsg(bert, table, ids[0], LSG)).abs().max() <= TOLERANCE


def test_a_mask_has_room_for_the_nodes_and_for_nothing_else(tmp_path: Path) -> None:
    write_lsg(tmp_path / "lsg", "Bart", "Model")
    hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    ours = AutoModel.from_pretrained(tmp_path / "sparse").eval()
    batch = tiny_batch(90, padding=0)
    asked = {"decoder_input_ids": batch["input_ids"][:, :7]}
    with torch.no_grad():
        whole = ours(**batch, **asked)
        read = whole.encoder_last_hidden_state
        again = ours(encoder_outputs=(read,), attention_mask=batch["attention_mask"], **asked)
        assert torch.equal(again.last_hidden_state, whole.last_hidden_state)
        # of someone else's encoder
        without = ours(encoder_outputs=(read[:, :90],), attention_mask=batch["attention_mask"], **asked)
        assert not torch.allclose(without.last_hidden_state, whole.last_hidden_state)
        with pytest.raises(
            ValueError, match=r"attention_mask must have shape \[batch, tokens\] = \[2, 93\], got \[2, 85\]"
        ):
            ours(encoder_outputs=(read,), attention_mask=batch["attention_mask"][:, :85], **asked)


def test_beams_read_the_global_tokens_too(tmp_path: Path) -> None:
    write_lsg(tmp_path / "lsg", "Bart", "ForConditionalGeneration")
    hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    batch = tiny_batch(90, padding=23)
    asked: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    cached = model.generate(**batch, **asked)
    assert torch.equal(cached, model.generate(**batch, **asked, use_cache=False))
    with torch.no_grad():
        alone = model.generate(input_ids=batch["input_ids"][1:, :67], **asked)
    assert torch.equal(cached[1, : alone.shape[1]], alone[0])


def test_a_head_reads_the_first_global_token(tmp_path: Path) -> None:
    dense, table = write_lsg(tmp_path / "lsg", "Roberta", "ForSequenceClassification")
    hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse").eval()
    batch = tiny_batch(90, padding=0)
    with torch.no_grad():
        said = ours(**batch).logits
        first = read_by_lsg(dense, table, batch["input_ids"][0], LSG)[:1].float()
        want = ours.classifier(first[None])
    assert (said[0] - want[0]).abs().max() <= TOLERANCE


def test_what_is_saved_again_says_the_same_and_trains(tmp_path: Path) -> None:
    write_lsg(tmp_path / "lsg", "Roberta", "ForMaskedLM")
    report = hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse", max_length=400)
    assert (report.max_length_before, report.max_length) == (208, 400)
    assert report.wide_open_note == "not compared: the code of LSG roberta does not run"
    assert report.files_left_behind == ("modeling_lsg_roberta.py",)
    held = json.loads((tmp_path / "sparse/config.json").read_text())
    assert held["architectures"] == ["SparseRobertaForMaskedLM"]
    assert not {*LSG, "auto_map"} & held.keys()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse")
    model.save_pretrained(tmp_path / "again")
    batch = tiny_batch(300)
    with torch.no_grad():
        first = model.eval()(**batch).logits
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval()(**batch).logits
    assert torch.equal(first, again)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.roberta.sparse_nodes.weight.grad.abs().max() > 0


def test_half_precision_and_another_pattern(tmp_path: Path) -> None:
    write_lsg(tmp_path / "lsg")
    path = tmp_path / "lsg/model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    assert load_file(tmp_path / "sparse/model.safetensors")["sparse_nodes.weight"].dtype == torch.bfloat16
    report = hf_sparse.convert(tmp_path / "lsg", tmp_path / "band", hf_sparse.pattern("band", radius=4))
    assert report.dropped.tensors == 1
    assert "sparse_nodes.weight" not in load_file(tmp_path / "band/model.safetensors")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sparsity_type": "lsh"}, "has sparsity_type 'lsh', which draws hashes anew in each pass"),
        ({"sparsity_type": "bos_pooling"}, "has sparsity_type 'bos_pooling', which reads padding"),
        ({"mask_first_token": True}, "has mask_first_token, which no pattern here has"),
        ({"is_decoder": True}, "has is_decoder, and its pattern cannot be causal"),
        ({"model_type": "pegasus"}, "is an LSG pegasus, and only LSG checkpoints of albert, bart, bert, camembert"),
        (
            {"block_size": 8, "sparsity_factor": 8, "sparsity_type": "stride"},
            "keeps 1 tokens of a block, an odd number",
        ),
        ({"sparsity_factor": 3}, "sparsity_factor must divide block_size"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    write_lsg(tmp_path / "lsg", **fields)
    with pytest.raises(ValueError, match=said):
        hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")
    assert not (tmp_path / "sparse").exists()


def test_missing_weights_and_what_needs_a_dense_source_are_refused(tmp_path: Path) -> None:
    write_lsg(tmp_path / "lsg")
    (tmp_path / "text").write_text("a word")
    with pytest.raises(ConversionError, match=r"needs a dense source, and .* is a LSG roberta"):
        hf_sparse.plan_layers(tmp_path / "lsg", tmp_path / "text", 0.5)
    path = tmp_path / "lsg/model.safetensors"
    weights = load_file(path)
    del weights["embeddings.global_embeddings.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ConversionError, match=r"lacks embeddings\.global_embeddings\.weight with 3 rows"):
        hf_sparse.convert(tmp_path / "lsg", tmp_path / "sparse")


def test_a_dense_model_may_have_the_pattern_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert", "Model")
    pattern = hf_sparse.pattern("lsg", block_size=8, sparse_block_size=8)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern)
    assert report.wide_open_note.startswith("not comparable: tokens read global tokens")
    said = AutoModel.from_pretrained(tmp_path / "sparse")(**tiny_batch(60)).last_hidden_state
    assert said.isfinite().all()
