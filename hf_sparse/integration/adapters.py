"""Which layers of a model adapters such as LoRA go on."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_sparse.integration.layers import self_attention_modules


def lora_targets(model: PreTrainedModel) -> list[str]:
    """Return the names of all linear layers of a model's self-attention, for the ``target_modules`` of a ``LoraConfig``.

    Those of SAC's predictors and of Sinkhorn's sorters, which are read in another way, are left out. Those of GPT-2 hold their
    weights the other way round: there ``fan_in_fan_out`` has to be True.

    Args:
        model: a transformers model, dense or sparse.
    """
    inside = tuple(f"{path}." for _, _, path, _ in self_attention_modules(model))
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(inside)
    ]
