"""Low-rank adapters: a cheap way to recover after a conversion."""

from typing import Any

from torch import nn

from hf_sparse.errors import RecipeError
from hf_sparse.integration.layers import self_attention_modules


def add_lora(model: Any, rank: int) -> Any:
    """Return a model of which adapters, position tables, norms and what the checkpoint did not hold are trained.

    Args:
        model: a transformers model.
        rank: of the adapters, which all linear layers of self-attention get; at least 1.

    Raises:
        RecipeError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("--lora needs peft; pip install 'hf-sparse[peft]'") from error
    named = dict(model.named_modules())
    inside = tuple(f"{path}." for _, _, path, _ in self_attention_modules(model))
    adapted = [name for name, module in named.items() if isinstance(module, nn.Linear) and name.startswith(inside)]
    base = {name for name, module in named.items() if module is model.base_model}
    heads = [
        name for name, module in model.named_children() if name not in base and any(True for _ in module.parameters())
    ]
    kept = [name for name, module in named.items() if "norm" in type(module).__name__.lower() or _is_positions(name)]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=adapted, modules_to_save=[*heads, *kept])
    return get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Return the model without adapters: their products are added to its weights."""
    return model.merge_and_unload()


def _is_positions(name: str) -> bool:
    return name.endswith(("position_embeddings", "wpe", "embed_positions"))
