"""Where transformers and peft look models up by name, type or place, a sparse model is what the dense one is, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import hf_sparse
from hf_sparse.global_rows import can_fold
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
