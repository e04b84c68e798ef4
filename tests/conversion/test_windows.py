"""Models of which some layers have a sliding window of their own: those keep it, the others follow the pattern."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

import hf_sparse
from tests.support.masked_models import under_a_mask
from tests.support.rounding import assert_within_rounding
from tests.support.zoo import inputs_of, said_of, tiny_of_type

WIDE = hf_sparse.pattern("strided", stride=3)
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
# what the window of 8 leaves of a layer, each side
DENSE_WINDOW = {"modernbert": 8, "gemma2": 7, "gemma3_text": 7, "qwen2": 7}


def write(folder: Path, model_type: str, **fields: Any) -> PreTrainedModel:
    """Save a tiny random model of a windowed and a full layer, and return it."""
    own = {"use_sliding_window": True, "max_window_layers": 1} if model_type == "qwen2" else {}
    model = tiny_of_type(model_type, **{**MIXED, **own, **fields})
    model.save_pretrained(folder)
    return model


def served(model: PreTrainedModel) -> list[Any]:
    return [module._sparse.pattern for module in model.modules() if hasattr(module, "_sparse")]


@pytest.mark.parametrize("model_type", DENSE_WINDOW)
def test_a_pattern_that_reads_farther_is_for_the_other_layers(tmp_path: Path, model_type: str) -> None:
    dense = write(tmp_path / "dense", model_type)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WIDE)
    assert report.layers == {"0": "dense"}
    auto: Any = AutoModelForMaskedLM if model_type == "modernbert" else AutoModelForCausalLM
    sparse = auto.from_pretrained(tmp_path / "sparse").eval()
    assert served(sparse) == [None, WIDE]
    window, causal = hf_sparse.pattern("band", radius=DENSE_WINDOW[model_type]), model_type != "modernbert"
    shares = [pattern.density(64, is_causal=causal) for pattern in (window, WIDE)]
    assert report.density == pytest.approx(sum(shares) / 2, rel=1e-9)
    inputs = inputs_of(dense)
    # the first layer: as it is, its own mask leaves out what is beyond the window
    layers = {
        id(module): layer for layer, module in enumerate(m for m in dense.modules() if hasattr(m, "sliding_window"))
    }
    with under_a_mask(dense, lambda q, k: (q - k) % 3 == 0, only=lambda module: layers[id(module)] == 1) as masked:
        plain, exact = said_of(masked, inputs), said_of(masked.double(), inputs)
    assert_within_rounding(said_of(sparse, inputs), exact, plain)


@pytest.mark.parametrize("model_type", DENSE_WINDOW)
def test_a_pattern_inside_the_window_is_for_all_layers(tmp_path: Path, model_type: str) -> None:
    write(tmp_path / "dense", model_type)
    inside = hf_sparse.pattern("band", radius=7)
    assert hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", inside).layers == {}
    # tokens that a call marks would be read from beyond the window
    marked = hf_sparse.pattern("longformer", window=4, global_projections=False)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "marked", marked)
    assert report.layers == {"0": "dense"}


@pytest.mark.parametrize("model_type", DENSE_WINDOW)
def test_a_pattern_named_for_a_layer_is_taken_or_refused(tmp_path: Path, model_type: str) -> None:
    write(tmp_path / "dense", model_type)
    own = hf_sparse.pattern("band", radius=2)
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WIDE, layers={0: own})
    assert report.layers == {"0": own.to_dict()}
    with pytest.raises(ValueError, match=r"layer 0 of .* has a sliding window of"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "refused", WIDE, layers={0: WIDE})
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_equals_recomputing(model_type: str, cache: str) -> None:
    own = {"use_sliding_window": True, "max_window_layers": 1} if model_type == "qwen2" else {}
    model = hf_sparse.sparsify_(tiny_of_type(model_type, **MIXED, **own), WIDE)
    model.generation_config.eos_token_id = None
    inputs = inputs_of(model, tokens=20)
    inputs = {name: value.flip(1) for name, value in inputs.items()}
    settings = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 1}
    kept = {"cache_implementation": "static"} if cache == "static" else {}
    assert torch.equal(
        model.generate(**inputs, **settings, **kept), model.generate(**inputs, **settings, use_cache=False)
    )


@pytest.mark.parametrize("method", ["linear", "ntk", "yarn"])
def test_only_rotary_positions_of_layers_that_read_far_are_scaled(tmp_path: Path, method: str) -> None:
    write(tmp_path / "dense", "modernbert")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", WIDE, max_length=160, positions=method)
    assert report.wide_open_difference is not None
    held = json.loads((tmp_path / "sparse/config.json").read_text())
    parameters = held["rope_parameters"]
    assert parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert parameters["full_attention"] != {"rope_type": "default", "rope_theta": 160000.0}
    assert held["max_position_embeddings"] == 160
    assert AutoModel.from_pretrained(tmp_path / "sparse").config.max_position_embeddings == 160


def test_a_softcap_reaches_every_layer(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", "gemma2", attn_logit_softcapping=0.5)
    inputs = inputs_of(dense)
    opened = hf_sparse.pattern("band", radius=100)
    got = said_of(hf_sparse.sparsify_(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval(), opened), inputs)
    plain, exact = said_of(dense, inputs), said_of(dense.double(), inputs)
    assert_within_rounding(got, exact, plain)
    without = tiny_of_type("gemma2", **MIXED, attn_logit_softcapping=None)
    assert (said_of(without, inputs) - plain).abs().max() > 1e-3 * plain.abs().max()
