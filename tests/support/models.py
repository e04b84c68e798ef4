"""Tiny random transformers models and batches for tests; nothing here knows hf_sparse."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra")


def tiny_config(family: str, *, positions: int = 128, **fields: Any) -> Any:
    """Return a config of two layers, four heads, width 32, without dropout."""
    dropout = (
        {"dropout": 0.0, "attention_dropout": 0.0}
        if family == "DistilBert"
        else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    sizes = (
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}
        if family == "DistilBert"
        else {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
    )
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}
    config = getattr(transformers, f"{family}Config")
    settings = {"vocab_size": 64, "max_position_embeddings": positions, "initializer_range": 0.2}
    return config(**settings, **sizes, **{**dropout, **tokens, **fields})


def tiny_model(family: str, head: str = "Model", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode, e.g. ``tiny_model("Bert", "ForMaskedLM")``."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{family}{head}")(tiny_config(family, **fields))
    return model.eval()


def tiny_batch(
    tokens: int = 40, *, rows: int = 2, padding: int = 9, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Return ids and a mask; the last row is padded, and each row has a separator at index 6 of its real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    first = padding if side == "left" else 0
    ids[:, 6] = 2
    if padding:
        ids[-1, 6], ids[-1, first + 6] = ids[-1, 7], 2
        padded = slice(0, padding) if side == "left" else slice(tokens - padding, tokens)
        ids[-1, padded], mask[-1, padded] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}
