"""Tiny random models of transformers' own sparse classes, as the oracles they are; nothing here knows hf_sparse."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

_BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
_BERT |= {"initializer_range": 0.2}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37}
_BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.2}
_TOKENS = {"vocab_size": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
_BLOCKS = {"block_size": 8, "num_random_blocks": 2}
# what differs from layer to layer is what goes wrong
_SIZES: dict[str, dict[str, Any]] = {
    "Longformer": {**_BERT, "attention_window": [8, 16], "max_position_embeddings": 210},
    "LED": {
        **_BART,
        "attention_window": [8, 16],
        "max_encoder_position_embeddings": 208,
        "max_decoder_position_embeddings": 50,
    },
    "BigBird": {**_BERT, **_BLOCKS, "max_position_embeddings": 256},
    "BigBirdPegasus": {**_BART, **_BLOCKS, "max_position_embeddings": 256},
}
HEADS = {
    "Longformer": (
        *("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification"),
        "ForMultipleChoice",
    ),
    "LED": ("Model", "ForConditionalGeneration", "ForQuestionAnswering"),
    "BigBird": ("Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForMultipleChoice"),
    "BigBirdPegasus": ("Model", "ForConditionalGeneration"),
}
# what a family becomes
AS_DENSE = {"Longformer": "Roberta", "LED": "Bart", "BigBird": "Bert", "BigBirdPegasus": "Pegasus"}


def write_in_tree(folder: Path, family: str, head: str = "Model", **fields: Any) -> PreTrainedModel:
    """Save a tiny random model of one of the classes, all its weights drawn at random, and return it in evaluation mode."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**_TOKENS, **_SIZES[family], **fields})
    model: PreTrainedModel = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # layer norms stay near 1, so that what is told apart is not told apart by size
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if "norm" in name.lower() else 0.1)
    model.save_pretrained(folder)
    return model.eval()


def read_by(model: PreTrainedModel, batch: dict[str, Tensor], *, training: bool = False) -> Tensor:
    """Return what a model says first, of the real tokens where it says something of tokens."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "activation_dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    if type(model).__name__.endswith("ForMultipleChoice"):
        batch = {name: value[:, None] for name, value in batch.items()}
    elif model.config.is_encoder_decoder:
        batch = {**batch, "decoder_input_ids": batch["input_ids"][:, :30]}
    with torch.no_grad():
        said: Tensor = model.train(training)(**batch).to_tuple()[0]
    model.eval()
    mask = batch["attention_mask"].bool()
    return said[mask] if said.shape[:2] == mask.shape else said
