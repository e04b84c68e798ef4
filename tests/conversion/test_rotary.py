"""Rotary positions and sliding windows: what is written for longer texts, and that nothing of a checkpoint is dropped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_sparse
from hf_sparse import UnsupportedModelError
from hf_sparse.conversion import Count
from tests.support import rules
from tests.support.checkpoints import edit_json, write_checkpoint
from tests.support.decoders import allowed_pairs, tiny_decoder, tiny_prompts
from tests.support.rounding import assert_within_rounding

BAND = hf_sparse.pattern("band", radius=8)
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LENGTH = 160
SCALED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def write_decoder(folder: Path, family: str = "Llama", **fields: Any) -> PreTrainedModel:
    """Save a tiny random decoder of 64 positions, and return it."""
    model = tiny_decoder(family, **fields)
    model.save_pretrained(folder)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return held


def frequencies(model: PreTrainedModel) -> torch.Tensor:
    return model.base_model.rotary_emb.inv_freq


def wide_logits(folder: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what a converted folder says with a band that reads everything."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sparse_attention = {**config.sparse_attention, "pattern": hf_sparse.pattern("band", radius=LENGTH).to_dict()}
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, config=config).eval()(**batch).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_carried_and_the_config_says_the_rest(tmp_path: Path, family: str) -> None:
    write_decoder(tmp_path / "dense", family)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (report.tiled, report.added, report.max_length_before, report.max_length) == (Count(), Count(), 64, LENGTH)
    assert report.wide_open_difference is not None
    config = read_config(tmp_path / "sparse")
    assert config["max_position_embeddings"] == LENGTH
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_wide_open_every_family_says_what_its_source_says(tmp_path: Path, family: str) -> None:
    dense = write_decoder(tmp_path / "dense", family)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH, verify=False)
    # longer than the source: rotary positions have no end
    batch = tiny_prompts(100, side="right")
    real = batch["attention_mask"] != 0
    got = wide_logits(tmp_path / "sparse", batch)
    with torch.no_grad():
        plain = dense(**batch).logits
        assert_within_rounding(got[real], dense.double()(**batch).logits[real], plain[real])


def test_a_config_of_older_versions_is_written_as_today(tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", rope_parameters={**SCALED, "rope_theta": 500.0})
    edit_json(tmp_path / "dense/config.json", rope_parameters=None, rope_theta=500.0, rope_scaling=SCALED)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH)
    config = read_config(tmp_path / "sparse")
    assert config["rope_parameters"] == {**SCALED, "rope_theta": 500.0, "original_max_position_embeddings": 64}
    assert not {"rope_theta", "rope_scaling"} & config.keys()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert torch.equal(frequencies(made), frequencies(dense))


def test_gpt_neox_of_older_versions_turns_the_same_share_of_a_head(tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", "GPTNeoX")
    edit_json(tmp_path / "dense/config.json", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=10000.0)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH, positions="ntk")
    config = read_config(tmp_path / "sparse")
    # a head of 8 turns 4 numbers: 4 / (4 - 2)
    raised = pytest.approx(10000.0 * 2.5**2)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": raised, "partial_rotary_factor": 0.5}
    assert not {"rotary_pct", "rotary_emb_base"} & config.keys()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert frequencies(made).shape == frequencies(dense).shape
    assert frequencies(made)[1] == pytest.approx(frequencies(dense)[1].item() / 2.5, rel=1e-6)


def test_scaling_that_leaves_its_factor_open_keeps_the_old_one(tmp_path: Path) -> None:
    factors = [1.0 + at for at in range(4)]
    held = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, "rope_theta": 10000.0}
    parameters = {**held, "original_max_position_embeddings": 32}
    dense = write_decoder(tmp_path / "dense", rope_parameters=parameters)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH)
    assert read_config(tmp_path / "sparse")["rope_parameters"] == {**parameters, "factor": 2.0}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert made.base_model.rotary_emb.attention_scaling == dense.base_model.rotary_emb.attention_scaling


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("none", {"rope_type": "default", "rope_theta": 10000.0}),
        ("linear", {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}),
        # a head turns 8 numbers: 8 / (8 - 2)
        ("ntk", {"rope_type": "default", "rope_theta": 10000.0 * 2.5 ** (8 / 6)}),
        (
            "yarn",
            {"rope_type": "yarn", "factor": 2.5, "rope_theta": 10000.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_a_method_equals_the_dense_model_with_the_same_positions(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    dense = write_decoder(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=LENGTH, positions=method)
    assert report.wide_open_difference is not None
    held = read_config(tmp_path / "sparse")["rope_parameters"]
    # what was scaled is said wherever the conversion is described
    assert report.rotary == (None if method == "none" else held)
    card = (tmp_path / "sparse/README.md").read_text()
    assert all(("rotary positions" in text.lower()) == (method != "none") for text in (str(report), card))
    assert held == {**parameters, "rope_theta": pytest.approx(parameters["rope_theta"])}
    twin = tiny_decoder("Llama", positions=LENGTH, rope_parameters=dict(held))
    twin.load_state_dict(dense.state_dict())
    batch = tiny_prompts(100, side="right")
    real = batch["attention_mask"] != 0
    got = wide_logits(tmp_path / "sparse", batch)
    with torch.no_grad():
        plain, unscaled = twin(**batch).logits, dense(**batch).logits
        assert_within_rounding(got[real], twin.double()(**batch).logits[real], plain[real])
    assert torch.equal(plain, unscaled) == (method == "none")


def test_the_command_line_takes_the_method(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_sparse.cli import app

    write_decoder(tmp_path / "dense")
    words = ["convert", str(tmp_path / "dense"), str(tmp_path / "sparse"), "--pattern", "band", "--set", "radius=8"]
    done = CliRunner().invoke(app, [*words, "--max-length", str(LENGTH), "--positions", "yarn", "--no-verify"])
    assert done.exit_code == 0, done.output
    assert read_config(tmp_path / "sparse")["rope_parameters"]["rope_type"] == "yarn"


@pytest.mark.parametrize(
    ("fields", "asks", "says"),
    [
        (
            {},
            {"positions": "cubic", "max_length": LENGTH},
            "positions must be one of none, linear, ntk, yarn, dynamic for llama, which has rotary positions; got 'cubic'",
        ),
        ({}, {"positions": "yarn"}, "give max_length as well"),
        (
            {"rope_parameters": {**SCALED, "rope_theta": 500.0}},
            {"positions": "linear", "max_length": LENGTH},
            r"scaled already \(rope_type 'llama3'\); give positions='none'",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
            {"max_length": LENGTH},
            "'dynamic' are scaled by max_position_embeddings.*leave max_length out",
        ),
        ({"head_dim": 2}, {"positions": "ntk", "max_length": LENGTH}, "needs at least 4 rotary dimensions a head"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, fields: dict[str, Any], asks: dict[str, Any], says: str) -> None:
    write_decoder(tmp_path / "dense", **fields)
    with pytest.raises(ValueError, match=says):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, **asks)
    assert not (tmp_path / "sparse").exists()


def test_a_method_of_another_kind_of_positions_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "dense", "Bert")
    with pytest.raises(ValueError, match="one of tile, interpolate for bert, which has a learned table of positions"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=300, positions="linear")


def test_projections_of_a_pattern_s_own_are_refused(tmp_path: Path) -> None:
    write_decoder(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=r"LlamaAttention turns queries.*set global_projections=False"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern("longformer"))


def test_a_pattern_inside_a_sliding_window_equals_dense_attention_under_both(tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", "Mistral", sliding_window=9)
    batch = tiny_prompts(50, side="right")
    real = batch["attention_mask"] != 0
    for radius in (4, 8):
        made = tmp_path / f"sparse-{radius}"
        report = hf_sparse.convert(
            tmp_path / "dense", made, hf_sparse.pattern("band", radius=radius), max_length=LENGTH
        )
        assert report.wide_open_difference is not None
        assert read_config(made)["sliding_window"] == 9
        # the whole triangle, so that the window of the source is all that is left out but for the band
        held = {**batch, "attention_mask": allowed_pairs(batch["attention_mask"], rules.band(radius))}
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(made).eval()(**batch).logits
            plain = dense(**held).logits
            assert_within_rounding(got[real], dense.double()(**held).logits[real], plain[real])
            if radius == 8:
                # what the window shows is what the band of 8 shows
                assert_within_rounding(got[real], dense(**batch).logits[real], plain[real])
        dense.float()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (hf_sparse.pattern("band", radius=9), "reads 10 keys back"),
        (hf_sparse.pattern("band", radius=4) | hf_sparse.pattern("global"), "reads without end"),
        (hf_sparse.pattern("strided", stride=4), "reads without end"),
        (hf_sparse.pattern("block_local", block_size=10), "reads 10 keys back"),
        (hf_sparse.pattern("reformer"), "reads without end"),
    ],
    ids=lambda value: getattr(value, "key", ""),
)
def test_a_pattern_beyond_a_sliding_window_is_refused_with_a_way_out(tmp_path: Path, pattern: Any, says: str) -> None:
    write_decoder(tmp_path / "dense", "Mistral", sliding_window=9)
    words = rf"layer 0 of mistral has a sliding window of 9 tokens.*{says}.*radius=8.*\"sliding_window\": null"
    with pytest.raises(ValueError, match=words):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", pattern)
    with pytest.raises(ValueError, match="has a sliding window of 9 tokens"):
        hf_sparse.sparsify_(tiny_decoder("Mistral", sliding_window=9), pattern)
    # a window as wide as the longest text leaves nothing out
    write_decoder(tmp_path / "wide", "Mistral", sliding_window=64)
    hf_sparse.convert(tmp_path / "wide", tmp_path / "sparse", pattern, verify=False)


def test_layers_with_and_without_a_window_are_told_apart(tmp_path: Path) -> None:
    dense = write_decoder(tmp_path / "dense", "Qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    wide = hf_sparse.pattern("band", radius=99)
    with pytest.raises(ValueError, match="layer 1 of qwen2 has a sliding window"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", wide, layers={1: wide})
    batch = tiny_prompts(50, side="right")
    real = batch["attention_mask"] != 0
    for at, own in enumerate((hf_sparse.pattern("band", radius=8), "dense")):
        made = tmp_path / f"sparse-{at}"
        report = hf_sparse.convert(tmp_path / "dense", made, wide, layers={1: own}, max_length=LENGTH)
        own_share = hf_sparse.pattern("band", radius=8).density(LENGTH, is_causal=True)
        assert report.density == pytest.approx((wide.density(LENGTH, is_causal=True) + own_share) / 2, rel=1e-9)
        with torch.no_grad():
            got = AutoModelForCausalLM.from_pretrained(made).eval()(**batch).logits
            plain = dense.float()(**batch).logits
            assert_within_rounding(got[real], dense.double()(**batch).logits[real], plain[real])


def test_marked_tokens_beyond_a_sliding_window_are_refused() -> None:
    pattern = hf_sparse.pattern("longformer", window=6, global_projections=False)
    model, batch = hf_sparse.sparsify_(tiny_decoder("Mistral", sliding_window=9), pattern), tiny_prompts()
    with pytest.raises(
        ValueError, match="sliding window of 9 tokens of its own, which global tokens would read beyond"
    ):
        model(**batch, global_attention_mask=torch.ones_like(batch["input_ids"]))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("radius", [3, 8])
def test_generation_past_a_sliding_window_equals_recomputing(cache: str, radius: int) -> None:
    pattern = hf_sparse.pattern("band", radius=radius) if radius == 3 else hf_sparse.pattern("band", radius=8)
    model = hf_sparse.sparsify_(tiny_decoder("Mistral", sliding_window=9), pattern)
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 1}
    kept = {"cache_implementation": "static"} if cache == "static" else {}
    for tokens, padding in ((21, 6), (5, 2)):
        batch = tiny_prompts(tokens, padding=padding)
        assert torch.equal(
            model.generate(**batch, **settings, **kept), model.generate(**batch, **settings, use_cache=False)
        )


def test_positions_count_from_the_first_token_where_a_cache_has_dropped_keys() -> None:
    # blocks stand where they stand, whatever keys are left
    model = hf_sparse.sparsify_(
        tiny_decoder("Mistral", sliding_window=9), hf_sparse.pattern("block_local", block_size=5)
    )
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 1}
    for batch in (tiny_prompts(21, padding=6), tiny_prompts(12, padding=3, seed=1)):
        assert torch.equal(model.generate(**batch, **settings), model.generate(**batch, **settings, use_cache=False))
