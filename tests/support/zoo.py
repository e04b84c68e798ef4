"""Tiny random models of any type that transformers has, by the names of config fields; nothing here knows hf_sparse."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

TOKENS = 40
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "global_head_dim", "query_pre_attn_scalar"), 8),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("true_hidden_size", "intra_bottleneck_size"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "type_vocab_size": 2,
    "embedding_size": 16,
    "max_target_positions": 64,
    "num_mel_bins": 8,
    "image_size": 16,
    "patch_size": 4,
    "sliding_window": 8,
    "local_attention": 16,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}


def tiny_config_of(model_type: str, **fields: Any) -> Any:
    """Return a config of two layers, four heads and a width of 32, as far as its fields have the usual names."""
    config_class: Any = CONFIG_MAPPING[model_type]
    known = {field.name: field.default for field in dataclasses.fields(config_class)}
    given = {name: value for name, value in _SIZES.items() if name in known}
    off = [name for name in known if "dropout" in name or name.endswith(("_pdrop", "layerdrop"))]
    given |= {name: 0.0 for name in off if not isinstance(known[name], bool)}
    if "kv_lora_rank" in known:
        # keys and values of all heads come from one vector
        given["num_key_value_heads"] = 4
    if "layer_types" in known:
        given["layer_types"] = ["full_attention", "full_attention"]
    elif "sliding_window" in known:
        # as long as the longest text: it leaves nothing out
        given["sliding_window"] = 64
    config = config_class(**{**given, **fields})
    # products of groups of experts know no float64
    config._experts_implementation = "eager"
    return config


def tiny_of_type(model_type: str, *, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """Return a tiny random model in evaluation mode: with a language model's or a classifier's head where there is one."""
    config = tiny_config_of(model_type, **fields)
    names = ("CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
    mappings = [*(getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING") for name in names), modeling_auto.MODEL_MAPPING]
    if getattr(config, "is_encoder_decoder", False):
        # a decoder alone is another model
        mappings = mappings[3:]
    made = next(mapping[type(config)] for mapping in mappings if type(config) in mapping)
    cls: Any = made[0] if isinstance(made, (tuple, list)) else made
    torch.manual_seed(seed)
    model: PreTrainedModel = cls(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            # what starts as 0 would prove nothing
            if weight.is_floating_point() and not weight.any():
                weight.normal_(std=0.2)
    return model


def inputs_of(model: PreTrainedModel, *, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Return a batch of two: texts of which the second is padded on the right, images, or sounds."""
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    ids = torch.randint(5, 60, (2, tokens), generator=generator)
    if model.main_input_name == "input_features":
        features = torch.randn(2, model.config.num_mel_bins, 2 * model.config.max_source_positions, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    # less than a sliding window: a dense model makes nothing of a token that reads none
    ids[1, -5:], mask[1, -5:] = 1, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs


def said_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model says of the real tokens of a batch: logits, or the last hidden states."""
    with torch.no_grad():
        said = model(**inputs)
    found: Tensor = said.logits if getattr(said, "logits", None) is not None else said.last_hidden_state
    mask = inputs.get("attention_mask")
    return found[mask != 0] if mask is not None and found.shape[:2] == mask.shape else found
