"""Tiny random transformers models and batches for tests; nothing here knows hf_sparse."""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "DistilBert", "Electra")
VISION_FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "Beit")


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


def tiny_vision_config(family: str, *, image_size: Any = 16, **fields: Any) -> Any:
    """Return a config of two layers, four heads, width 32 and patches of 4 x 4 pixels; of BEiT, with absolute positions."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4, "num_labels": 3}
    own = {
        "ViT": {"intermediate_size": 37, "encoder_stride": 4},
        "DeiT": {"intermediate_size": 37, "encoder_stride": 4},
        "Dinov2": {"mlp_ratio": 2},
        "Dinov2WithRegisters": {"mlp_ratio": 2},
        "Beit": {"intermediate_size": 37, "use_absolute_position_embeddings": True, "vocab_size": 64},
    }
    config = getattr(transformers, f"{family}Config")
    return config(image_size=image_size, initializer_range=0.2, **{**sizes, **own[family], **fields})


def tiny_vision_model(family: str, head: str = "Model", *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a tiny random model of images in evaluation mode; positions and prefix tokens, which some start at 0, too."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{family}{head}")(tiny_vision_config(family, **fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("position_embeddings", "_token", "_tokens")):
                parameter.normal_(std=0.5)
    return model.eval()


def tiny_images(height: int, width: int | None = None, *, seed: int = 0) -> Tensor:
    """Return a batch of two random images."""
    return torch.randn(2, 3, height, width or height, generator=torch.Generator().manual_seed(seed))
