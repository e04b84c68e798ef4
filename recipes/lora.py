"""Low-rank adapters: a cheap way to recover after a conversion."""

from typing import Any

from transformers.pytorch_utils import Conv1D

from hf_sparse.errors import RecipeError
from hf_sparse.integration.adapters import lora_targets


def add_lora(model: Any, rank: int, made: frozenset[str] = frozenset()) -> Any:
    """Return a model of which adapters, position tables, norms and what the checkpoint did not hold are trained.

    Args:
        model: a transformers model.
        rank: of the adapters, which all linear layers of self-attention get; at least 1.
        made: names of the parameters that the checkpoint did not hold.

    Raises:
        RecipeError: if peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("--lora needs peft; pip install 'hf-sparse[peft]'") from error
    named = dict(model.named_modules())
    adapted = lora_targets(model)
    # GPT-2 stores the weights of its own kind of linear layer the other way round
    is_turned = any(isinstance(named[name], Conv1D) for name in adapted)
    base = {name for name, module in named.items() if module is model.base_model}
    # a head that shares the weights of the embeddings stays as it is, but for its norms
    shared = model.get_output_embeddings()
    heads = [
        name
        for name, module in model.named_children()
        if "" not in base
        and name not in base
        and any(True for _ in module.parameters())
        and all(inner is not shared for inner in module.modules())
    ]
    kept = [
        name
        for name, module in named.items()
        if ("norm" in type(module).__name__.lower() or _is_positions(name)) and name.partition(".")[0] not in heads
    ]
    # such as a pooler, but nothing around the output embeddings
    of_made = {name.rpartition(".")[0] for name in made} - {*kept, *adapted, ""}
    kept += [
        name
        for name in sorted(of_made)
        if name.partition(".")[0] not in heads and all(inner is not shared for inner in named[name].modules())
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=adapted,
        modules_to_save=[*heads, *kept],
        fan_in_fan_out=is_turned,
    )
    found = get_peft_model(model, config)
    for name, parameter in found.named_parameters():
        # tables that are parameters of their own, as those of images
        if _is_positions(name):
            parameter.requires_grad_(True)
    return found


def merge_lora(model: Any) -> Any:
    """Return the model without adapters: their products are added to its weights."""
    return model.merge_and_unload()


def _is_positions(name: str) -> bool:
    return name.endswith(
        ("position_embeddings", "position_embedding", "wpe", "embed_positions", "relative_attention_bias")
    )
