"""Where transformers and peft look models up by name, type or place, a sparse model is what the dense one is, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, T5EncoderModel, Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import hf_sparse
from hf_sparse.global_rows import can_fold
from hf_sparse.integration.attention import attend
from hf_sparse.integration.layers import start_states
from tests.support.models import tiny_batch, tiny_model
from tests.support.zoo import tiny_of_type

pytestmark = pytest.mark.usefixtures("one_thread")
BAND = hf_sparse.pattern("band", radius=4)


def test_labels_of_next_tokens_are_smoothed_as_such(tmp_path: Path) -> None:
    model = hf_sparse.sparsify_(tiny_of_type("gpt2"), BAND)
    batch = tiny_batch(20, padding=0)
    batch["labels"] = batch["input_ids"]
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    loss = Trainer(model, args).compute_loss(model, dict(batch))
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    wanted = LabelSmoother(0.1)(outputs, batch["labels"].clone(), shift_labels=True)
    torch.testing.assert_close(loss, wanted)


# peft asks a model by an older name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_are_not_saved_as_those_of_the_dense_checkpoint(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="adapters need hf-sparse[peft]")
    tiny_model("Bert").save_pretrained(tmp_path / "dense")
    model = hf_sparse.sparsify_(type(tiny_model("Bert")).from_pretrained(tmp_path / "dense"), BAND)
    config = peft.LoraConfig(r=2, target_modules=hf_sparse.lora_targets(model))
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapters")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapters").base_model_name_or_path in (None, "")


def test_decoder_ids_of_whisper_stay_as_they_are() -> None:
    dense = tiny_of_type("whisper")
    sparse = hf_sparse.sparsify_(tiny_of_type("whisper"), BAND)
    ids, start = torch.tensor([[9, 8, 7], [6, 5, 4]]), torch.tensor([1, 1])

    def prepared(model: Any) -> Any:
        given = {"decoder_input_ids": ids}
        return model._prepare_decoder_input_ids_for_generation(2, "input_features", given, start)[0]

    assert prepared(dense).equal(ids)
    assert prepared(sparse).equal(ids)
    bart = hf_sparse.sparsify_(tiny_of_type("bart"), BAND)
    assert prepared(bart).tolist() == [[1, 9, 8, 7], [1, 6, 5, 4]]


def test_documents_that_would_read_one_another_are_refused() -> None:
    batch = tiny_batch(20, padding=0)
    documents = torch.zeros_like(batch["input_ids"])
    model = hf_sparse.sparsify_(tiny_model("Bert"), BAND)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="document_ids reach no attention with attn_implementation='sdpa'"):
        model(**batch, document_ids=documents)
    bart = hf_sparse.sparsify_(tiny_of_type("bart"), BAND)
    with pytest.raises(
        ValueError, match="SparseBartForConditionalGeneration reads all documents of a row from its decoder"
    ):
        bart(**batch, document_ids=documents)


def test_sorters_are_not_adapted() -> None:
    pattern = hf_sparse.pattern("sinkhorn", block_size=8, sort_net="learned", max_blocks=16)
    names = hf_sparse.lora_targets(hf_sparse.sparsify_(tiny_model("Bert"), pattern))
    assert names
    assert not any("sparse_state" in name for name in names)


@pytest.mark.parametrize(
    "pattern",
    [
        hf_sparse.pattern("sinkhorn", block_size=8, sort_net="learned", max_blocks=16),
        hf_sparse.pattern("sac"),
    ],
    ids=lambda pattern: pattern.key,
)
def test_quantizers_find_no_layers_that_a_pattern_reads_by_itself(pattern: hf_sparse.Pattern) -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), pattern)
    states = [module for name, module in model.named_modules() if name.endswith("sparse_state")]
    assert states
    assert not any(isinstance(module, torch.nn.Linear) for state in states for module in state.modules())


class _Quantized(torch.nn.Linear):
    """As bitsandbytes has it: int8 weights that mean nothing without their scales, a plain bias."""

    def __init__(self, plain: torch.nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        scale = plain.weight.detach().abs().amax() / 127
        self.weight = torch.nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.scale = plain.bias, scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert inputs.is_floating_point()
        return torch.nn.functional.linear(inputs, self.weight * self.scale, self.bias)


def test_quantized_relays_say_nearly_what_plain_ones_say() -> None:
    pattern = hf_sparse.pattern("star", relay_projections=True)
    model = hf_sparse.sparsify_(tiny_model("Bert"), pattern)
    batch = tiny_batch(24, padding=0)
    for name, module in model.named_modules():
        if name.endswith("sparse_state"):
            torch.nn.init.normal_(module.output.weight, std=0.2)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = model(**batch).last_hidden_state
        for name, module in model.named_modules():
            if name.endswith("sparse_state"):
                module.output = _Quantized(module.output)  # type: ignore[arg-type]
        quantized = model(**batch).last_hidden_state
    assert 0 < (quantized - plain).abs().max() < 0.02 * plain.abs().max()


def test_weights_do_not_start_from_quantized_ones() -> None:
    model: Any = tiny_model("Bert")
    for layer in model.encoder.layer:
        for name in ("query", "key", "value"):
            setattr(layer.attention.self, name, _Quantized(getattr(layer.attention.self, name)))
    with pytest.raises(hf_sparse.UnsupportedModelError, match=r"quantized \(torch.int8\).*then load the sparse one"):
        hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=8))


def test_layers_of_each_kind_are_tried() -> None:
    # those that stand first have no self-attention
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    model = hf_sparse.sparsify_(tiny_of_type("qwen3_next", layer_types=kinds, num_hidden_layers=4), BAND)
    assert model.config.model_type == "sparse_qwen3_next"


@pytest.mark.parametrize("model_type", ["nemotron", "stablelm"])
def test_layers_that_take_further_arguments_and_leave_it_at_that_are_closed(model_type: str) -> None:
    model = hf_sparse.sparsify_(tiny_of_type(model_type), BAND)
    ids = torch.arange(5, 25)[None]
    documents = torch.arange(20)[None] // 10
    with pytest.raises(ValueError, match=r"cannot be given document_ids: .*DecoderLayer of transformers"):
        model(input_ids=ids, document_ids=documents)
    with pytest.raises(ValueError, match="cannot be given document_ids"):
        model(input_ids=ids, position_ids=torch.arange(20)[None] % 10)


def test_compiled_layers_pass_on_what_they_are_given() -> None:
    model: Any = tiny_of_type("llama")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    hf_sparse.sparsify_(model, BAND)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        apart = model(input_ids=ids, document_ids=torch.arange(20)[None] // 10).logits
        assert (apart - model(input_ids=ids).logits).abs().max() > 1e-3


def test_weights_that_were_loaded_do_not_mind_quantized_ones_beside_them() -> None:
    model: Any = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("longformer", window=8))
    modules = [layer.attention.self for layer in model.encoder.layer]
    for module in modules:
        module.query = _Quantized(module.query)
        for parameter in module.sparse_state.parameters():
            parameter._is_hf_initialized = True
    start_states(modules)
    modules[0].sparse_state.query.weight._is_hf_initialized = False
    with pytest.raises(hf_sparse.UnsupportedModelError, match="is quantized"):
        start_states(modules)


def test_what_is_refused_leaves_a_model_as_it_was() -> None:
    model: Any = tiny_model("Bert")
    model.encoder.layer[1].attention.self.key = _Quantized(model.encoder.layer[1].attention.self.key)
    batch = tiny_batch(24)
    with torch.no_grad():
        before = model(**batch).last_hidden_state
        with pytest.raises(hf_sparse.UnsupportedModelError, match="is quantized"):
            hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=8))
        assert type(model).__name__ == "BertModel"
        assert torch.equal(model(**batch).last_hidden_state, before)


def test_blocks_that_a_model_chooses_are_not_dropped() -> None:
    kinds = ["full_attention"] * 3 + ["minimax_m3_sparse"]
    model: Any = tiny_of_type("minimax_m3_vl_text", layer_types=kinds, num_hidden_layers=4)
    with pytest.raises(hf_sparse.UnsupportedModelError, match="has blocks of keys that it chooses by itself"):
        hf_sparse.sparsify_(model, BAND)
    bert: Any = hf_sparse.sparsify_(tiny_model("Bert"), BAND)
    states = torch.randn(1, 4, 16, 8)
    with pytest.raises(ValueError, match="chooses blocks of keys by itself"):
        attend(bert.encoder.layer[0].attention.self, states, states, states, None, block_indices=states)


def test_a_sparse_checkpoint_in_a_dense_class_is_told_as_such(tmp_path: Path) -> None:
    # as sentence-transformers loads encoders of T5
    hf_sparse.sparsify_(tiny_of_type("t5"), BAND).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    dense = T5EncoderModel.from_pretrained(tmp_path, config=config).eval()
    with pytest.raises(ValueError, match="a sparse checkpoint was loaded by a dense class"), torch.no_grad():
        dense(ids)


def test_dense_attention_of_continuous_batching_is_refused() -> None:
    model = hf_sparse.sparsify_(tiny_of_type("llama"), BAND)
    with pytest.raises(ValueError, match=r"use generate\(\), or set_attn_implementation\('sdpa'\)"):
        model.generate_batch([[5, 6, 7]])


def test_weights_that_lie_elsewhere_are_not_read_past_their_modules() -> None:
    model = hf_sparse.sparsify_(tiny_model("Bert"), hf_sparse.pattern("longformer", window=8))
    state: Any = model.encoder.layer[0].attention.self.sparse_state
    assert can_fold(state)
    state.key._hf_hook = object()
    assert not can_fold(state)
