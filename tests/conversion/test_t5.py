"""T5 and its kin: the bias by buckets of distances stays as it is, at any length, without a tensor of all pairs."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_sparse
from hf_sparse import UnsupportedModelError
from hf_sparse.conversion import Count
from tests.support.masked_models import under_a_mask
from tests.support.rounding import assert_same_maths, assert_within_rounding
from tests.support.zoo import inputs_of, said_of, tiny_of_type

BAND = hf_sparse.pattern("band", radius=4)
LONGFORMER = hf_sparse.pattern("longformer", window=8, global_tokens=(0,))


def write_t5(folder: Path, model_type: str = "t5", **fields: Any) -> PreTrainedModel:
    """Save a tiny random T5 whose buckets end at a distance of 20, and return it."""
    model = tiny_of_type(model_type, relative_attention_num_buckets=8, relative_attention_max_distance=20, **fields)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # so that it weighs as much as the products
            if "relative_attention_bias" in name:
                weight.mul_(6.0)
    model.save_pretrained(folder)
    return model


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor held which an operation gave."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        for held in given if isinstance(given, (tuple, list)) else (given,):
            if isinstance(held, Tensor):
                self.numbers = max(self.numbers, held.numel())
        return given


def test_every_number_is_carried_and_only_the_length_is_new(tmp_path: Path) -> None:
    write_t5(tmp_path / "dense")
    report = hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, max_length=4000)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (report.tiled, report.added, report.max_length_before, report.max_length) == (Count(), Count(), 512, 4000)
    assert report.wide_open_difference is not None
    config = json.loads((tmp_path / "sparse/config.json").read_text())
    assert config["n_positions"] == 4000
    assert AutoModel.from_pretrained(tmp_path / "sparse").config.n_positions == 4000


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_far_beyond_its_buckets_it_says_what_its_source_says_under_the_mask(tmp_path: Path, model_type: str) -> None:
    dense = write_t5(tmp_path / "dense", model_type)
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern("strided", stride=7))
    inputs = inputs_of(dense, tokens=150)
    got = said_of(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval(), inputs)
    with under_a_mask(dense, lambda q, k: (q - k) % 7 == 0) as masked:
        plain, exact = said_of(masked, inputs), said_of(masked.double(), inputs)
    assert_within_rounding(got, exact, plain)


def test_gradients_of_the_bias_are_those_of_the_dense_model(tmp_path: Path) -> None:
    dense = write_t5(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND)
    inputs = inputs_of(dense)
    name = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def gradients(model: PreTrainedModel) -> list[Tensor]:
        model(**inputs).logits[inputs["decoder_attention_mask"] != 0].square().mean().backward()
        found = [model.get_parameter(f"{stack}.{name}").grad for stack in ("encoder", "decoder")]
        model.zero_grad()
        return [grad.clone() for grad in found if grad is not None]

    got = gradients(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").double().eval())
    with under_a_mask(dense.double(), lambda q, k: abs(q - k) <= 4) as masked:
        exact = gradients(masked)
    assert len(got) == 2
    for actual, oracle in zip(got, exact, strict=True):
        assert actual.any()
        # all pairs of two rows of 40 tokens may add up in one bucket
        assert_same_maths(actual, oracle, terms=2 * 40 * 40)


def test_no_tensor_of_all_pairs_is_made(tmp_path: Path) -> None:
    write_t5(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, verify=False)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse")
    tokens = 3000
    ids = torch.randint(5, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    with Largest() as seen:
        model(input_ids=ids, decoder_input_ids=ids[:, :20]).logits.sum().backward()
    # of the encoder alone all pairs would be 9 million
    assert seen.numbers < tokens * 300


def test_generation_with_a_cache_equals_recomputing_every_token(tmp_path: Path) -> None:
    write_t5(tmp_path / "dense")
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval()
    model.generation_config.update(eos_token_id=None, decoder_start_token_id=0)
    read = {name: value for name, value in inputs_of(model).items() if not name.startswith("decoder")}
    ids = torch.zeros(2, 1, dtype=torch.int64)
    # past the last bucket
    for _ in range(23):
        with torch.no_grad():
            said = model(**read, decoder_input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, said[:, -1:].argmax(-1)], 1)
    settings = {"max_new_tokens": 23, "do_sample": False, "num_beams": 1}
    for kept in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**read, **settings, **kept), ids)


def test_the_encoder_alone_follows_the_layers_of_the_encoder(tmp_path: Path) -> None:
    write_t5(tmp_path / "dense")
    narrow = hf_sparse.pattern("band", radius=1)
    layers = {"encoder.1": narrow, "decoder.0": "dense"}
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", LONGFORMER, layers=layers)
    whole = AutoModel.from_pretrained(tmp_path / "sparse").eval()
    alone = hf_sparse.integration.auto.sparse_model_class(transformers.T5EncoderModel).from_pretrained(
        tmp_path / "sparse"
    )
    held = [module._sparse.pattern for module in alone.modules() if hasattr(module, "_sparse")]
    assert held == [LONGFORMER, narrow]
    inputs = inputs_of(whole)
    read = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    with torch.no_grad():
        got, want = alone.eval()(**read).last_hidden_state, whole(**inputs).encoder_last_hidden_state
    assert torch.equal(got, want)


def test_under_another_attention_name_and_in_copies_the_bias_is_what_it_was(tmp_path: Path) -> None:
    dense = write_t5(tmp_path / "dense")
    inputs = inputs_of(dense)
    sparse = hf_sparse.sparsify_(copy.deepcopy(dense), BAND)
    said = said_of(sparse, inputs)
    for made in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(said_of(made, inputs), said)
    sparse.set_attn_implementation("sdpa")
    assert torch.equal(said_of(sparse, inputs), said_of(dense, inputs))


def test_layers_declared_dense_have_the_bias_too(tmp_path: Path) -> None:
    dense = write_t5(tmp_path / "dense")
    layers = {f"{stack}.{layer}": "dense" for stack in ("encoder", "decoder") for layer in range(2)}
    hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", BAND, layers=layers)
    inputs = inputs_of(dense)
    got, plain = (
        said_of(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sparse").eval(), inputs),
        said_of(dense, inputs),
    )
    assert_within_rounding(got, said_of(dense.double(), inputs), plain)


@pytest.mark.parametrize("key", ["reformer", "etc", "bp_transformer"])
def test_patterns_that_serve_no_bias_are_refused(tmp_path: Path, key: str) -> None:
    write_t5(tmp_path / "dense")
    with pytest.raises((UnsupportedModelError, ValueError), match=r"bias by distance|no embeddings that nodes"):
        hf_sparse.convert(tmp_path / "dense", tmp_path / "sparse", hf_sparse.pattern(key))
    assert not (tmp_path / "sparse").exists()
