"""The check that a model would obey a pattern."""

import contextlib
import copy
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.layers import dispatches, self_attention_modules
from hf_sparse.integration.mask import SparseMask, sparse_mask
from hf_sparse.integration.vision import vision_family_of

_PROBE = "hf_sparse:probe"


def check_obeys(model_class: type[nn.Module], config: Any) -> None:
    """Check that a model hands its attention and its padding to the attention interface.

    First by structure, then by counting: a tiny copy of the model (two layers and one of each kind, small vocabulary, random
    weights) runs once on a padded batch, and every self-attention module must have called, with the padding.

    Args:
        model_class: a transformers model class.
        config: its config; not changed.

    Raises:
        UnsupportedModelError: if the model would ignore the pattern or the padding; says where.
    """
    check_dispatches(model_class, config)
    check_no_position_bias(config)
    name = f"{model_class.__name__} ({config.model_type})"
    # a segmentation head reads layers by number
    is_whole = model_class.__name__.endswith("ForSemanticSegmentation")
    tiny = _tiny_config(config, most_layers=config.num_hidden_layers if is_whole else 2)
    tiny._attn_implementation = _PROBE
    with _probing() as (calls, refusals), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = model_class(tiny).eval()
        strays = [
            f"{path} ({type(module).__name__})"
            for path, module in model.named_modules()
            if _attends_alone(path, module)
        ]
        if strays:
            raise UnsupportedModelError(f"{name} cannot be made sparse: {strays[0]} computes attention by itself")
        modules = self_attention_modules(model)
        inputs = _tiny_inputs(model, tiny)
        with torch.no_grad():
            model(**inputs)
    for _, _, path, module in modules:
        if id(module) not in calls:
            raise UnsupportedModelError(
                f"{name} cannot be made sparse: {path} never called the attention interface, so a pattern would be ignored"
            )
        if "attention_mask" in inputs and not calls[id(module)]:
            raise UnsupportedModelError(f"{name} cannot be made sparse: {path} was not handed the padding mask")
        if id(module) in refusals:
            raise UnsupportedModelError(
                f"{name} cannot be made sparse: {path} has {refusals[id(module)]}, which sparse attention does not honour"
            )
    if not modules:
        raise UnsupportedModelError(f"{name} cannot be made sparse: it has no self-attention module")


def check_dispatches(model_class: type[nn.Module], config: Any) -> None:
    """Check that any module in the files that a model class comes from names transformers' attention interface.

    Raises:
        UnsupportedModelError: if none does.
    """
    if not _may_dispatch(model_class):
        raise UnsupportedModelError(
            f"{model_class.__name__} ({config.model_type}) cannot be made sparse: its attention does not go through "
            "transformers' attention interface, so a pattern would be silently ignored"
        )


def check_no_position_bias(config: Any) -> None:
    """Check that a model adds no bias of relative positions to its attention mask, as most BEiT checkpoints do.

    Raises:
        UnsupportedModelError: if it does.
    """
    for field in ("use_relative_position_bias", "use_shared_relative_position_bias"):
        if getattr(config, field, False):
            raise UnsupportedModelError(
                f"{config.model_type} with {field}=True cannot be made sparse: it adds a bias for every pair of tokens to its "
                "attention, which sparse attention does not serve; take a checkpoint with absolute positions"
            )


def _may_dispatch(model_class: type[nn.Module]) -> bool:
    """Say whether any module in the files that a model class comes from names transformers' attention interface."""
    source = sys.modules[model_class.__module__]
    for parent in model_class.__mro__:
        module = sys.modules.get(parent.__module__, source)
        classes = [c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, nn.Module)]
        for cls in classes:
            code = getattr(inspect.unwrap(cls.forward), "__code__", None)
            if code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
    return False


def _attends_alone(path: str, module: nn.Module) -> bool:
    """Say whether a module looks like attention that does not dispatch: three projections of its own and the name."""
    linears = sum(isinstance(child, nn.Linear) for child in module.children())
    return bool(re.search(r"Attention$", type(module).__name__)) and linears >= 3 and not dispatches(module)


def _tiny_config(config: Any, *, most_layers: int) -> Any:
    tiny = copy.deepcopy(config)
    kinds = list(getattr(tiny, "layer_types", None) or ())
    if len(kinds) > most_layers and len(kinds) == config.num_hidden_layers:
        # what stands first may be of one kind, and have no attention
        kept = kinds[:most_layers]
        tiny.layer_types = kept + [kind for kind in dict.fromkeys(kinds) if kind not in kept]
        most_layers = len(tiny.layer_types)
    if getattr(tiny, "num_kv_shared_layers", 0):
        # the last ones would take keys of layers that are not there
        tiny.num_kv_shared_layers = 0
    for field in ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(getattr(tiny, field, None), int):
            setattr(tiny, field, min(most_layers, getattr(tiny, field)))
    for field in (
        "intermediate_size",
        "moe_intermediate_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "ffn_dim",
        "d_ff",
    ):
        # what stands beside attention is most of a large model
        if isinstance(getattr(tiny, field, None), int):
            setattr(tiny, field, min(64, getattr(tiny, field)))
    if isinstance(getattr(tiny, "max_source_positions", None), int):
        tiny.max_source_positions = min(8, tiny.max_source_positions)
    if vision_family_of(tiny) is not None:
        # two rows of two patches
        patch = tiny.patch_size
        tiny.image_size = 2 * patch if isinstance(patch, int) else [2 * patch[0], 2 * patch[1]]
    else:
        # a head that classifies a batch of texts asks where each ends
        tiny.pad_token_id = 0 if getattr(tiny, "pad_token_id", None) is None else tiny.pad_token_id
        tiny.use_cache = False
    special = [v for k, v in vars(tiny).items() if k.endswith("_token_id") and isinstance(v, int)]
    if isinstance(getattr(tiny, "vocab_size", None), int):
        tiny.vocab_size = min(tiny.vocab_size, max([32, *[v + 1 for v in special if v < 1000]]))
        for key in [k for k in vars(tiny) if k.endswith("_token_id")]:
            value = getattr(tiny, key)
            if isinstance(value, int) and value >= tiny.vocab_size:
                setattr(tiny, key, tiny.vocab_size - 1)
    return tiny


def _tiny_inputs(model: Any, config: Any) -> dict[str, Tensor]:
    if model.main_input_name == "input_features":
        ids = torch.full((2, 6), config.vocab_size // 2)
        features = torch.zeros(2, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": features, "decoder_input_ids": ids}
    if model.main_input_name != "input_ids":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width)}
    ids = torch.full((2, 6), config.vocab_size // 2)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    if isinstance(getattr(config, "eos_token_id", None), int):
        # BART classifies what the last of these became
        ids[:, 3] = config.eos_token_id
    inputs = {"input_ids": ids, "attention_mask": mask}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {key: value[:, None] for key, value in inputs.items()}
    if getattr(config, "is_encoder_decoder", False):
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    return inputs


@contextlib.contextmanager
def _probing() -> Iterator[tuple[dict[int, bool], dict[int, str]]]:
    """Yield a count of attention calls: by module, whether every call brought the padding, and what in a mask is refused."""
    calls: dict[int, bool] = {}
    refusals: dict[int, str] = {}

    def probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any) -> Any:
        mask = attention_mask
        brings = isinstance(mask, SparseMask) and mask.padding is not None
        brings |= isinstance(mask, Tensor) and mask.dim() in (2, 4)
        calls[id(module)] = brings and calls.get(id(module), True)
        if isinstance(mask, SparseMask) and mask.refusal is not None:
            refusals[id(module)] = mask.refusal
        if given.get("block_indices") is not None:
            refusals[id(module)] = "blocks of keys that it chooses by itself"
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, sparse_mask)
    try:
        yield calls, refusals
    finally:
        AttentionInterface._global_mapping.pop(_PROBE, None)
        AttentionMaskInterface._global_mapping.pop(_PROBE, None)
