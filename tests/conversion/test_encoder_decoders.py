"""Encoder-decoders, converted: the encoder sparse both ways, the decoder causally, what joins them dense."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_sparse
from hf_sparse.conversion import Count
from tests.support import rules
from tests.support.checkpoints import tree
from tests.support.decoders import allowed_pairs, tiny_decoder, tiny_prompts, train_two_steps
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import tiny_of_type

BAND = hf_sparse.pattern("band", radius=4)
LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))
LENGTH = 150
HEADS = ["ForConditionalGeneration", "ForSequenceClassification", "ForQuestionAnswering", "Model"]


def write_bart(folder: Path, head: str = "ForConditionalGeneration", **fields: Any) -> PreTrainedModel:
    """Save a tiny random BART of 64 positions, and return it."""
    model = tiny_decoder("Bart", head, **fields)
    model.save_pretrained(folder)
    return model


def batch_of(source: int = 40, target: int = 23) -> dict[str, Tensor]:
    """Return a batch in which the second source and the first target are padded on the right."""
    read, said = tiny_prompts(source, side="right"), tiny_prompts(target, side="right", seed=1)
    named = {"decoder_input_ids": said["input_ids"].flip(0), "decoder_attention_mask": said["attention_mask"].flip(0)}
    return {**read, **named}


def both_ways(mask: Tensor, rule: rules.Rule) -> Tensor:
    """Return the pairs that a rule allows in an encoder, bool ``[B, 1, S, S]``; the padding is on the right."""
    drawn = rules.draw(rule, mask.shape[1])[None]
    return (drawn & (mask != 0)[:, None, None, :]) | torch.eye(mask.shape[1], dtype=torch.bool)


def oracle(dense: PreTrainedModel, batch: dict[str, Tensor], encoder: rules.Rule, decoder: rules.Rule) -> Tensor:
    """Return what a dense BART says under the masks of two rules."""
    with torch.no_grad():
        pairs = both_ways(batch["attention_mask"], encoder)
        read = dense.model.encoder(input_ids=batch["input_ids"], attention_mask=pairs)
        said = {
            "decoder_input_ids": batch["decoder_input_ids"],
            "decoder_attention_mask": allowed_pairs(batch["decoder_attention_mask"], decoder),
        }
        return dense(encoder_outputs=read, attention_mask=batch["attention_mask"], **said).logits


def test_both_tables_repeat_behind_their_two_unused_rows(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    tables = {f"model.{stack}.embed_positions.weight" for stack in ("encoder", "decoder")}
    assert after.keys() == before.keys()
    assert tables <= before.keys()
    for name in before:
        rows = range(LENGTH + 2) if name in tables else range(len(before[name]))
        want = torch.stack([before[name][row if row < 2 or name not in tables else 2 + (row - 2) % 64] for row in rows])
        assert torch.equal(after[name], want), name
    assert (report.tiled, report.added) == (Count(2, 2 * (LENGTH + 2) * 32), Count())
    assert (report.max_length_before, report.max_length) == (64, LENGTH)
    # two layers of each stack
    shares = BAND.density(LENGTH) + BAND.density(LENGTH, is_causal=True)
    assert report.density == pytest.approx(shares / 2, rel=1e-9)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pattern", [BAND, LONGFORMER], ids=lambda pattern: pattern.key)
def test_wide_open_every_head_says_what_its_source_says(tmp_path: Path, head: str, pattern: Any) -> None:
    write_bart(tmp_path / "dense", head)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern, max_length=LENGTH)
    assert report.wide_open_difference is not None
    assert report.wide_open_difference <= 1e-4
    auto = {"ForConditionalGeneration": "ForSeq2SeqLM", "Model": ""}.get(head, head)
    made, found = getattr(transformers, f"AutoModel{auto}").from_pretrained(
        tmp_path / "sparse", output_loading_info=True
    )
    assert type(made).__name__ == f"SparseBart{head}"
    assert not any(found.values())


def test_a_sparse_bart_equals_dense_attention_under_the_masks(tmp_path: Path) -> None:
    dense, batch = write_bart(tmp_path / "dense"), batch_of()
    narrow = hf_sparse.pattern("band", radius=2)
    for layers, decoder in (({}, rules.band(4)), ({"decoder.0": narrow, "decoder.1": narrow}, rules.band(2))):
        made = tmp_path / f"sparse-{len(layers)}"
        hf_sparse.convert(tmp_path / "dense", made, BAND, layers=layers)
        with torch.no_grad():
            got = AutoModelForSeq2SeqLM.from_pretrained(made).eval()(**batch).logits
        real = batch["decoder_attention_mask"] != 0
        plain = oracle(dense.float(), batch, rules.band(4), decoder)
        exact = oracle(dense.double(), batch, rules.band(4), decoder)
        assert_within_rounding(got[real], exact[real], plain[real])


def test_marked_tokens_are_the_encoder_s(tmp_path: Path) -> None:
    dense, batch = write_bart(tmp_path / "dense"), batch_of()
    marked = hf_sparse.pattern("longformer", window=8, global_projections=False)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", marked)
    sparse = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    is_global = torch.zeros_like(batch["input_ids"])
    is_global[:, [0, 7]] = 1
    with torch.no_grad():
        got = sparse(**batch, global_attention_mask=is_global).logits
    real = batch["decoder_attention_mask"] != 0
    encoder, decoder = rules.longformer(8, (0, 7)), rules.band(4)
    plain = oracle(dense, batch, encoder, decoder)
    exact = oracle(dense.double(), batch, encoder, decoder)
    assert_within_rounding(got[real], exact[real], plain[real])
    # generation hands the mask to the encoder too
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    cached = sparse.generate(**read, global_attention_mask=is_global, **settings)
    again = sparse.generate(**read, global_attention_mask=is_global, use_cache=False, **settings)
    assert torch.equal(cached, again)


def test_the_decoder_has_no_global_tokens_and_no_projections_of_its_own(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, max_length=LENGTH)
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    held = config["sparse_attention"]
    assert held["pattern"] == LONGFORMER.to_dict()
    own = {**LONGFORMER.to_dict(), "global_tokens": [], "global_projections": False}
    assert held["layers"] == {"decoder.0": own, "decoder.1": own}
    # two layers of the encoder, three projections, a weight and a bias each
    assert report.added.tensors == 12
    names = load_file(tmp_path / "sparse/model.safetensors").keys()
    assert all(".encoder." in name for name in names if ".sparse_state." in name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_recomputing_every_token(tmp_path: Path, cache: str) -> None:
    write_bart(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, max_length=LENGTH, verify=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    model.generation_config.update(forced_eos_token_id=None, eos_token_id=None)
    read = tiny_prompts(90, side="right")
    kept = {"cache_implementation": "static"} if cache == "static" else {}
    got = model.generate(**read, max_new_tokens=20, do_sample=False, num_beams=1, **kept)
    ids = torch.full((2, 1), 2)
    for _ in range(20):
        with torch.no_grad():
            said = model(**read, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, said[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_a_converted_bart_trains_saves_and_loads_twice(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, max_length=LENGTH, verify=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").train()
    read, labels = tiny_prompts(100, side="right"), tiny_prompts(23, padding=0, seed=1)["input_ids"]
    train_two_steps(model, **read, labels=labels)
    model.eval().save_pretrained(tmp_path / "once")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "once").eval()
    again.save_pretrained(tmp_path / "twice")
    assert tree(tmp_path / "once") == tree(tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(again(**read, labels=labels).logits, model(**read, labels=labels).logits)


def test_stacks_of_different_depth_and_heads_are_served(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense", decoder_layers=1, decoder_attention_heads=2)
    deep = hf_sparse.pattern("longformer", window=(4, 8), global_projections=False)
    with pytest.raises(ValueError, match="window has 2 entries, one a layer, but the model has 1"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", deep)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", deep, layers={"decoder.0": BAND})
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").config.decoder_layers == 1


def test_a_decoder_that_would_read_nothing_is_refused(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    alone = hf_sparse.pattern("global", positions=(0, 1))
    with pytest.raises(ValueError, match="the decoder would read nothing; unite it with another"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", alone)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", alone | BAND)


def test_nodes_stand_in_the_encoder_where_something_stands_before_its_layers(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern("etc"))
    assert report.layers == {"decoder.0": "dense", "decoder.1": "dense"}
    assert "model.encoder.sparse_nodes.weight" in load_file(tmp_path / "sparse/model.safetensors")
    tiny_of_type("pegasus").save_pretrained(tmp_path / "pegasus")
    with pytest.raises(hf_sparse.UnsupportedModelError, match="no embeddings that nodes could be put behind"):
        hf_sparse.convert(tmp_path / "pegasus", tmp_path / "other", hf_sparse.pattern("etc"))


@pytest.mark.filterwarnings("ignore:attn_implementation=.hf_sparse.band. lasts for this process only")
def test_an_attention_name_that_cannot_tell_cross_attention_is_refused() -> None:
    model = tiny_decoder("Bart", "ForConditionalGeneration")
    model.set_attn_implementation("hf_sparse:band")
    with pytest.raises(ValueError, match=r"does not tell its attention name whether it reads the encoder.*sparsify_"):
        model(**batch_of())


def test_a_sparse_config_lengthens_both_tables_as_it_loads(tmp_path: Path) -> None:
    dense = write_bart(tmp_path / "dense")
    config = hf_sparse.sparse_config(tmp_path / "dense", BAND, max_length=LENGTH)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense", config=config)
    for stack in ("encoder", "decoder"):
        table, learned = (held.get_parameter(f"model.{stack}.embed_positions.weight") for held in (model, dense))
        assert torch.equal(table, torch.cat([learned[:2], learned[2:].repeat(3, 1)[:LENGTH]]))
    with torch.no_grad():
        assert model(**batch_of(LENGTH, 70)).logits.isfinite().all()


def test_the_decoder_alone_follows_the_layers_of_the_decoder(tmp_path: Path) -> None:
    write_bart(tmp_path / "dense")
    narrow = hf_sparse.pattern("band", radius=1)
    layers = {"encoder.0": "dense", "decoder.1": narrow}
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, layers=layers)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    held = [module._sparse.pattern for module in alone.modules() if hasattr(module, "_sparse")]
    assert held[::2] == [LONGFORMER.for_decoder(), narrow]
