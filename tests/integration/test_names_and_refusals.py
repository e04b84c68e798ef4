"""Attention names, layers, and models that would ignore a pattern."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, PreTrainedModel

import hf_sparse
from hf_sparse.integration import register
from hf_sparse.patterns import PATTERNS
from tests.support.models import tiny_batch, tiny_config, tiny_model

BAND = hf_sparse.pattern("band", radius=2)


def logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).to_tuple()[0]


@pytest.mark.parametrize("key", sorted(PATTERNS))
def test_a_name_serves_a_dense_model_for_this_process(key: str) -> None:
    model, batch = tiny_model("Bert", "ForMaskedLM"), tiny_batch(100)
    if key in ("axial", "image_2d"):
        # a square of pixels, and images have no padding
        batch = {"input_ids": batch["input_ids"]}
    want = hf_sparse.sparsify_(tiny_model("Bert", "ForMaskedLM"), PATTERNS[key]())
    AttentionInterface._global_mapping[f"hf_sparse:{key}"].has_warned = False
    model.set_attn_implementation(f"hf_sparse:{key}")
    if key in ("longformer", "routing", "sac"):
        with pytest.raises(ValueError, match="owns weights on each layer"):
            logits(model, batch)
        return
    if PATTERNS[key]().has_nodes:
        with pytest.raises(ValueError, match="has nodes that live through all layers"):
            logits(model, batch)
        return
    with pytest.warns(UserWarning, match="saving the model loses it.*sparsify_"):
        got = logits(model, batch)
    assert torch.equal(got, logits(want, batch))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, batch)


def test_another_name_on_a_sparse_checkpoint_is_refused() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), BAND)
    model.set_attn_implementation("hf_sparse:bigbird")
    with pytest.raises(ValueError, match="sparse already"):
        model(**tiny_batch())


def test_both_interfaces_hold_our_names() -> None:
    for name in ("hf_sparse", *(f"hf_sparse:{key}" for key in PATTERNS)):
        assert name in AttentionInterface._global_mapping
        assert name in AttentionMaskInterface._global_mapping


def test_a_name_of_another_owner_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign() -> None: ...

    foreign.__module__ = "somebody_else"
    monkeypatch.setitem(AttentionInterface._global_mapping, "hf_sparse", foreign)
    with pytest.raises(RuntimeError, match="'hf_sparse' is held by somebody_else"):
        register.register_attention()
    assert AttentionInterface._global_mapping["hf_sparse"] is foreign


def test_layers_may_differ_and_stay_dense() -> None:
    batch = tiny_batch()
    wide = hf_sparse.pattern("band", radius=99)
    dense = logits(tiny_model("Bert"), batch)
    real = batch["attention_mask"].bool()
    budget = 64 * torch.finfo(torch.float32).eps * dense.abs().max()
    for layers in ({0: "dense", "1": "dense"}, {"0": wide, 1: "dense"}):
        model = hf_sparse.sparsify_(tiny_model("Bert"), BAND, layers=layers)
        assert (logits(model, batch) - dense)[real].abs().max() <= budget
    half = hf_sparse.sparsify_(tiny_model("Bert"), BAND, layers={0: "dense"})
    assert (logits(half, batch) - dense)[real].abs().max() > 1000 * budget


def test_layers_survive_saving(tmp_path: Any) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), BAND, layers={0: "dense"})
    model.save_pretrained(tmp_path)
    batch = tiny_batch()
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path).eval(), batch), logits(model, batch))


@pytest.mark.parametrize("layers", [{2: "dense"}, {"encoder.0": "dense"}, {"-1": BAND}])
def test_an_unknown_layer_is_refused(layers: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown layer.*known: 0, 1"):
        hf_sparse.sparsify_(tiny_model("Bert"), BAND, layers=layers)


def test_a_layer_that_is_neither_pattern_nor_dense_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a pattern or 'dense', got 'sdpa'"):
        hf_sparse.sparsify_(tiny_model("Bert"), BAND, layers={0: "sdpa"})


def test_a_bare_number_is_refused_where_there_are_two_stacks() -> None:
    config = transformers.BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"unknown layer '0'; known: decoder.0, encoder.0"):
        hf_sparse.sparsify_(transformers.BartModel(config), BAND, layers={0: "dense"})


def test_a_pattern_that_does_not_fit_the_heads_or_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="window has 3 entries, one a layer, but the model has 2"):
        hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("longformer", window=(4, 4, 4)))
    with pytest.raises(ValueError, match="by_head names 2 heads, but the model has 4"):
        hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.by_head({0: BAND, 1: BAND}))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("MPNet", {}),
        ("FNet", {}),
        ("DebertaV2", {}),
        ("Longformer", {"attention_window": 4}),
        ("BigBird", {}),
        ("IBert", {}),
    ],
)
def test_a_model_that_would_ignore_the_pattern_is_refused(name: str, fields: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=80, pad_token_id=1, **fields,
    )  # fmt: skip
    model = getattr(transformers, f"{name}Model")(config)
    with pytest.raises(hf_sparse.UnsupportedModelError, match=f"{name}Model.*cannot be made sparse"):
        hf_sparse.sparsify_(model, BAND)
    assert type(model).__name__ == f"{name}Model"


def test_a_model_whose_attention_drops_the_padding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_mask(self: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> tuple[None, None]:
        return None, None

    monkeypatch.setattr(transformers.BertModel, "_create_attention_masks", without_mask)
    with pytest.raises(hf_sparse.UnsupportedModelError, match="was not handed the padding mask"):
        hf_sparse.sparsify_(tiny_model("Bert"), BAND)


def test_a_model_that_never_calls_the_interface_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.bert import modeling_bert

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if hidden_states is None:
            modeling_bert.ALL_ATTENTION_FUNCTIONS.get_interface("eager", None)
        return hidden_states, None

    monkeypatch.setattr(modeling_bert.BertSelfAttention, "forward", forward)
    with pytest.raises(hf_sparse.UnsupportedModelError, match="never called the attention interface"):
        hf_sparse.sparsify_(tiny_model("Bert"), BAND)


def test_sparsify_takes_models_and_patterns_only() -> None:
    with pytest.raises(TypeError, match="takes a transformers model, got Linear"):
        hf_sparse.sparsify_(torch.nn.Linear(2, 2), BAND)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pattern must be a pattern"):
        hf_sparse.sparsify_(tiny_model("Bert"), "band")  # type: ignore[arg-type]


def test_sparsifying_twice_replaces_the_pattern() -> None:
    batch = tiny_batch()
    twice = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("longformer", window=4))
    hf_sparse.sparsify_(twice, BAND)
    once = hf_sparse.sparsify_(tiny_model("Bert"), BAND)
    assert torch.equal(logits(twice, batch), logits(once, batch))
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert type(twice) is type(once)


def test_the_config_of_the_caller_is_left_alone() -> None:
    config = tiny_config("Bert")
    before = config.to_dict()
    hf_sparse.sparse_config(config, BAND)
    assert config.to_dict() == before
