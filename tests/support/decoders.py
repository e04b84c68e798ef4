"""Tiny random decoders and encoder-decoders for tests, and the masks of dense oracles; nothing here knows hf_sparse."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.rules import draw

_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROTARY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 37,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "init_std": 0.2,
    "dropout": 0.0,
    "forced_eos_token_id": None,
}
_FIELDS: dict[str, dict[str, Any]] = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Bart": BART,
    "GPTNeoX": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "OPT": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 37,
        "word_embed_proj_dim": 32,
        "init_std": 0.2,
        "dropout": 0.0,
    },
    "Llama": _ROTARY,
    "Mistral": {**_ROTARY, "sliding_window": None},
    "Qwen2": _ROTARY,
    "Qwen3": _ROTARY,
}
HEADS = {"GPT2": "LMHeadModel"}


def tiny_decoder(
    family: str, head: str | None = None, *, positions: int = 64, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode: two layers a stack, four heads, no dropout, as a language model."""
    torch.manual_seed(seed)
    given = {"vocab_size": 64, "max_position_embeddings": positions, "initializer_range": 0.2}
    config = getattr(transformers, f"{family}Config")(**{**given, **_TOKENS, **_FIELDS[family], **fields})
    model: PreTrainedModel = getattr(transformers, f"{family}{head or HEADS.get(family, 'ForCausalLM')}")(config)
    if model.can_generate():
        # a row that has ended is filled with padding, which no recomputation says
        model.generation_config.eos_token_id = None
    return model.eval()


def tiny_prompts(tokens: int = 21, *, padding: int = 6, side: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Return two rows of ids and their mask, the second with padding on a side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (2, tokens), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(0, padding) if side == "left" else slice(tokens - padding, tokens)
    ids[1, padded], mask[1, padded] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def positions_of(mask: Tensor) -> Tensor:
    """Return the position ids that generation gives to a padded batch, int64 ``[B, T]``."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def allowed_pairs(mask: Tensor, rule: Callable[[int, int, int], bool], *, heads: int = 1) -> Tensor:
    """Return the pairs that a causal rule allows, positions counted from each row's first real token.

    Args:
        mask: int ``[B, T]``, 1 = a real token.
        rule: (head, query, key) -> whether the query reads the key, causality aside.
        heads: number of heads.

    Returns:
        bool ``[B, heads, T, T]``; a padding token reads itself, so that no softmax is empty.
    """
    batch, tokens = mask.shape
    allowed = torch.eye(tokens, dtype=torch.bool).repeat(batch, heads, 1, 1)
    for row in range(batch):
        at = mask[row].nonzero()[:, 0]
        first, stop = int(at[0]), int(at[-1]) + 1
        drawn = draw(rule, stop - first, heads=heads, is_causal=True)
        allowed[row, :, first:stop, first:stop] = drawn & (mask[row, first:stop] != 0)
    return allowed


def train_two_steps(model: PreTrainedModel, **batch: Tensor) -> None:
    """Train a model by two steps: every weight has a gradient, and the loss falls."""
    optimizer, losses = torch.optim.SGD(model.train().parameters(), lr=0.1), []
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
