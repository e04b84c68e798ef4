"""The in-tree Longformer and BigBird, which nobody here wrote, as oracles of converted models."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BigBirdConfig,
    BigBirdModel,
    LongformerConfig,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerModel,
    PreTrainedModel,
)

import hf_sparse
from tests.support.models import tiny_batch, tiny_model

# the bound: outputs are of size 1 to 4, float32
TOLERANCE = 1e-5


def fields_of(config: Any) -> dict[str, Any]:
    return {
        k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures", "transformers_version")
    }


def longformer_twin(model: PreTrainedModel, twin_class: type, window: int) -> PreTrainedModel:
    """Move the weights of a RoBERTa into an in-tree Longformer; its global projections are drawn at random."""
    twin = twin_class(LongformerConfig(**fields_of(model.config), attention_window=[window] * 2)).eval()
    state = {key.replace("roberta.", "longformer."): value for key, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for key in [key for key in state if ".attention.self." in key]:
        part = key.split(".")[-2]
        state[key.replace(f".{part}.", f".{part}_global.")] = 0.2 * torch.randn(state[key].shape, generator=generator)
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not [key for key in unexpected if "pooler" not in key], unexpected
    return twin


def take_global_projections(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Give our global projections the weights of the in-tree ones."""
    source = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".sparse_state." in name:
                key = name.replace("roberta.", "longformer.").replace(".sparse_state.", ".")
                head, _, kind = key.rpartition(".")
                parameter.copy_(source[f"{head}_global.{kind}"])


def run(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the outputs of real tokens, and gradients of the input embeddings."""
    real = batch["attention_mask"].bool()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    rest = {key: value for key, value in batch.items() if key != "input_ids"}
    out = model(inputs_embeds=embeddings, **rest).last_hidden_state
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (gradient,) = torch.autograd.grad((out * weights)[real].sum(), embeddings)
    return out[real].detach(), gradient


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.abs().max() > 0
        assert (own - other).abs().max() <= TOLERANCE


@pytest.mark.parametrize("tokens", [7, 16, 64, 100, 257])
@pytest.mark.parametrize("marks", ["none", "some", "all"])
def test_longformer_equals_the_in_tree_model(tokens: int, marks: str) -> None:
    model = tiny_model("Roberta", positions=tokens + 40, add_pooling_layer=False)
    twin = longformer_twin(model, LongformerModel, window=16)
    twin.pooler = None
    hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=16))
    take_global_projections(model, twin)
    batch = tiny_batch(tokens, padding=min(9, tokens // 3)) if tokens > 13 else tiny_batch(13, padding=4)
    is_global = torch.zeros_like(batch["input_ids"])
    if marks == "some":
        is_global[0, 0] = is_global[0, 5:8] = is_global[1, 3] = 1
    elif marks == "all":
        is_global = batch["attention_mask"].clone()
    batch["global_attention_mask"] = is_global
    assert_close(run(model, batch), run(twin, batch))


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
def test_heads_mark_the_same_global_tokens_as_the_in_tree_model(head: str) -> None:
    twin_class = {"ForSequenceClassification": LongformerForSequenceClassification}.get(
        head, LongformerForQuestionAnswering
    )
    model = tiny_model("Roberta", head, positions=140)
    twin = longformer_twin(model, twin_class, window=8)
    hf_sparse.sparsify_(model, hf_sparse.pattern("longformer", window=8))
    take_global_projections(model, twin)
    batch = tiny_batch(60)
    # the in-tree model expects three separators in each row
    for row in range(2):
        batch["input_ids"][row, [7, 40]] = 2
    with torch.no_grad():
        ours, theirs = model(**batch).to_tuple()[0], twin(**batch).to_tuple()[0]
    real = batch["attention_mask"].bool() if ours.shape == batch["input_ids"].shape else torch.ones_like(ours).bool()
    assert (ours - theirs)[real].abs().max() <= TOLERANCE
    with torch.no_grad():
        unmarked = model(**batch, global_attention_mask=torch.zeros_like(batch["input_ids"])).to_tuple()[0]
    assert (ours - unmarked)[real].abs().max() > 100 * TOLERANCE


def bigbird_twin(model: PreTrainedModel, block: int, positions: int) -> PreTrainedModel:
    """Move the weights of a BERT into an in-tree BigBird in training mode, where it has its random blocks."""
    fields = {
        **fields_of(model.config),
        "block_size": block,
        "num_random_blocks": 3,
        "attention_type": "block_sparse",
        "max_position_embeddings": positions,
        "sep_token_id": 2,
    }
    twin = BigBirdModel(BigBirdConfig(**fields), add_pooling_layer=False)
    state = model.state_dict()
    key = "embeddings.position_embeddings.weight"
    table = torch.zeros(positions, 32)
    table[: len(state[key])] = state[key]
    missing, unexpected = twin.load_state_dict({**state, key: table}, strict=False)
    assert not missing, missing
    assert all("pooler" in name for name in unexpected), unexpected
    return twin.train()


# lengths whose published plan reads no pair twice
@pytest.mark.parametrize(("tokens", "block"), [(16 * 12, 16), (16 * 20, 16), (64 * 24, 64), (3072, 64)])
def test_bigbird_equals_the_in_tree_model_in_training_mode(tokens: int, block: int) -> None:
    model = tiny_model("Bert", positions=tokens, hidden_act="gelu_new")
    # the in-tree early plan is drawn for as many positions as the config has
    twin = bigbird_twin(model, block, positions=4096 if block == 64 else tokens)
    hf_sparse.sparsify_(model, hf_sparse.pattern("bigbird", block_size=block, num_random_blocks=3, length="padded"))
    batch = tiny_batch(tokens, padding=block + 9)
    assert_close(run(model, batch), run(twin, batch))
    assert twin.attention_type == "block_sparse"
