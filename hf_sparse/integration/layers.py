"""The attention modules of a model: which are self-attention, in what order, and what each is tagged with."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.buckets import has_buckets
from hf_sparse.integration.entry import Entry
from hf_sparse.integration.windows import check_window, window_of
from hf_sparse.patterns import Band, Pattern
from hf_sparse.patterns.projections import GlobalProjections

# names of the query, key and value projections of a self-attention module
_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"))
_CROSS_NAMES = ("encoder_attn", "crossattention", "EncDecAttention")


# farther than any key is
EVERYTHING = Band(radius=2**40)


@dataclass(frozen=True)
class LayerTag:
    """What an attention module of a sparse model is to do.

    Attributes:
        pattern: None where the layer stays dense (cross-attention always does).
        index: of the layer among the self-attention modules of its stack.
        stack: "encoder" or "decoder" in a model that has both, "cross" for cross-attention, else "".
        band: what a dense layer reads: its sliding window, or everything.
    """

    pattern: Pattern | None
    index: int
    stack: str = ""
    band: Band = EVERYTHING


def tag_of(module: nn.Module) -> LayerTag | None:
    """Return what a module is tagged with; None outside of sparse models."""
    tag: Any = getattr(module, "_sparse", None)
    return tag if isinstance(tag, LayerTag) else None


def set_tag(module: nn.Module, tag: LayerTag) -> None:
    """Tag a module."""
    module.__dict__["_sparse"] = tag


def dispatches(module: nn.Module) -> bool:
    """Say whether a module's forward names transformers' attention interface."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Say whether an attention module reads another sequence than its own."""
    return (
        bool(getattr(module, "is_cross_attention", False))
        or type(module).__name__.endswith("CrossAttention")
        or name.endswith(_CROSS_NAMES)
    )


def self_attention_modules(model: nn.Module) -> list[tuple[str, int, str, nn.Module]]:
    """Return the self-attention modules of a model as (stack, index, name, module), in order.

    The stack is "encoder" or "decoder" in a model that has both, else "".
    """
    has_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    counts: dict[str, int] = {}
    found = []
    for name, module in model.named_modules():
        if not dispatches(module) or is_cross_attention(name, module):
            continue
        stack = ""
        if has_both:
            stack = "decoder" if "decoder" in re.split(r"\.", name) else "encoder"
        counts[stack] = counts.get(stack, -1) + 1
        found.append((stack, counts[stack], name, module))
    return found


def closed_module(model: nn.Module) -> str | None:
    """Return the first module on the way to self-attention that takes no further arguments along; None where all do.

    What a model is given beside its own arguments (``global_attention_mask``) would be lost there without a word.
    """
    named = dict(model.named_modules())
    for _, _, path, _ in self_attention_modules(model):
        parts = path.split(".")
        for stop in range(1, len(parts) + 1):
            module = named[".".join(parts[:stop])]
            takes = inspect.signature(module.forward).parameters.values()
            is_open = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes)
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not is_open:
                return type(module).__name__
    return None


def attach(model: nn.Module, entry: Entry) -> list[nn.Module]:
    """Tag the attention modules of a model and give them the weights their patterns own.

    Args:
        model: a transformers model; changed in place.
        entry: the pattern of each layer.

    Returns:
        The modules that were given new weights.

    Raises:
        ValueError: if the entry names a layer that is not there, or a pattern does not fit the model.
        UnsupportedModelError: if no self-attention module dispatches.
    """
    modules = self_attention_modules(model)
    if modules and all(not stack and "decoder" in name.split(".") for stack, _, name, _ in modules):
        entry = entry.of_stack("decoder")
    elif modules and _is_encoder_alone(model.config, modules):
        entry = entry.of_stack("encoder")
    check_entry(entry, modules, model.config)
    model.__dict__["_sparse_closed"] = closed_module(model)
    fresh = []
    for stack, index, _, module in modules:
        pattern = entry.pattern_of(stack, index)
        window = window_of(model.config, numbered(module, index), is_causal=is_causal(module))
        band = EVERYTHING if pattern is not None or window is None else Band(radius=window - 1)
        set_tag(module, LayerTag(pattern, index, stack, band))
        if pattern is not None and _own_state(module, pattern):
            fresh.append(module)
    for name, module in model.named_modules():
        if dispatches(module) and is_cross_attention(name, module):
            set_tag(module, LayerTag(None, 0, "cross"))
    return fresh


def _is_encoder_alone(config: Any, modules: list[tuple[str, int, str, nn.Module]]) -> bool:
    """Say whether a model is the encoder of a type that has two stacks, as ``T5EncoderModel`` is."""
    has_two = any(hasattr(config, field) for field in ("decoder_layers", "num_decoder_layers"))
    return has_two and all(not stack and "encoder" in name.split(".") for stack, _, name, _ in modules)


def check_entry(
    entry: Entry, modules: list[tuple[str, int, str, nn.Module]], config: Any, *, length: int | None = None
) -> None:
    """Check an entry against the layers of a model, and its longest input where one is given; errors as for ``attach``."""
    if not modules:
        raise UnsupportedModelError(f"{type(config).__name__}: no self-attention module uses the attention interface")
    known = {f"{stack}.{index}" if stack else str(index) for stack, index, _, _ in modules}
    num_layers = getattr(config, "num_hidden_layers", None) or len(modules)
    if entry.layers and len(modules) < num_layers:
        raise ValueError(f"layers cannot be told apart: {config.model_type} shares one attention module among layers")
    for key, _ in entry.layers:
        if key not in known:
            listed = ", ".join(sorted(known, key=lambda k: (k.rpartition(".")[0], int(k.rpartition(".")[2]))))
            raise ValueError(f"unknown layer {key!r}; known: {listed}")
    for stack, index, _, module in modules:
        pattern, heads = entry.pattern_of(stack, index), num_heads_of(module, config)
        if pattern is None or heads is None:
            continue
        pattern.check(num_layers=sum(other == stack for other, *_ in modules), num_heads=heads, length=length)
        where = f"layer {index} of {getattr(config, 'dense_model_type', config.model_type)}"
        if has_buckets(module) and (pattern.is_content_based or pattern.has_nodes or pattern.num_labels):
            raise UnsupportedModelError(
                f"{where} adds a bias by distance to its scores, and pattern {pattern.key!r} does not serve one: it finds its "
                "pairs by content, or has nodes or labels of its own; take another, or 'dense'"
            )
        causal = is_causal(module)
        window = window_of(config, numbered(module, index), is_causal=causal)
        longest = length or getattr(config, "max_position_embeddings", None) or (window or 0) + 1
        scope: dict[str, Any] = {"is_causal": causal, "heads": heads, "layer": index, "length": longest}
        check_window(pattern, window, where=where, **scope)


def numbered(module: nn.Module, index: int) -> int:
    """Return which layer of the config a self-attention module is: others may have no attention, and no number here."""
    layer: int | None = getattr(module, "layer_idx", None)
    return index if layer is None else layer


def is_causal(module: nn.Module) -> bool:
    """Say whether a self-attention module reads only what comes before, by its own account."""
    return bool(getattr(module, "is_causal", False))


def num_heads_of(module: nn.Module, config: Any) -> int | None:
    """Return the query heads of a self-attention module: stacks of one model may differ."""
    heads: int | None = getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    return heads


def share_heads_(model: nn.Module) -> None:
    """Tell each layer which of its heads are here, where transformers' tensor parallelism spreads them over ranks.

    Raises:
        UnsupportedModelError: if a layer owns weights of its pattern, which transformers does not spread.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return
    mesh: Any = model._device_mesh
    rank = (mesh if mesh.ndim == 1 else mesh["tp"]).get_local_rank()
    for _, index, _, module in self_attention_modules(model):
        if isinstance(getattr(module, "sparse_state", None), nn.Module):
            raise UnsupportedModelError(
                f"layer {index}: its pattern owns weights ({type(module.sparse_state).__name__}), which tensor parallelism "
                "does not spread; load the model without tp_plan, or convert it with a pattern that owns none"
            )
        module.__dict__["_sparse_share"] = rank, size, num_heads_of(module, model.config)


def heads_here(module: Any, count: int) -> tuple[int, int | None]:
    """Return the first of ``count`` heads that are here and how many the layer has; 0 and None where all are here."""
    rank, size, total = module.__dict__.get("_sparse_share", (0, 1, None))
    return (rank * count, total) if size > 1 and count * size == total else (0, None)


def projections(module: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Return the query, key and value projections of a self-attention module.

    Raises:
        UnsupportedModelError: if they are not three linear layers under a known name.
    """
    for names in _PROJECTIONS:
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(linear, nn.Linear) for linear in found):
            return found  # type: ignore[return-value]
    raise UnsupportedModelError(
        f"{type(module).__name__} has no separate query, key and value projections, which this pattern would copy or measure; "
        "set global_projections=False, relay_projections=False or max_relative_distance=0"
    )


def start_states(modules: list[nn.Module]) -> None:
    """Start the weights that patterns own and that were not loaded: projections as copies of the layers' own."""
    for module in modules:
        with torch.no_grad():
            state: Any = module.sparse_state
            if not isinstance(state, GlobalProjections):
                held = [*state.parameters(), *state.buffers()]
                if not all(getattr(tensor, "_is_hf_initialized", False) for tensor in held):
                    state.reset()
                continue
            for name, source in zip(("query", "key", "value"), projections(module), strict=True):
                _refuse_quantized(module, source.weight)
                target = getattr(module.sparse_state, name)
                for parameter, value in ((target.weight, source.weight), (target.bias, source.bias)):
                    if not getattr(parameter, "_is_hf_initialized", False):
                        parameter.copy_(value) if value is not None else parameter.zero_()
            for name in state.zeros:
                for parameter in getattr(state, name).parameters():
                    if not getattr(parameter, "_is_hf_initialized", False):
                        parameter.zero_()


def _own_state(module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(getattr(module, "sparse_state", None), nn.Module):
        return False
    if pattern.make_state(hidden_size=1, num_heads=1, num_key_value_heads=1, head_dim=1) is None:
        return False
    if next(iter(inspect.signature(module.forward).parameters)) != "hidden_states":
        raise UnsupportedModelError(
            f"{type(module).__name__} makes queries, keys and values of several inputs, and pattern {pattern.key!r} owns "
            "weights that read one; set global_projections=False, relay_projections=False or max_relative_distance=0"
        )
    state: Any = pattern.make_state(**_sizes(module))
    if isinstance(state, GlobalProjections):
        # they start as copies of the layer's own
        projections(module)
        if getattr(getattr(module, "config", None), "rope_parameters", None):
            raise UnsupportedModelError(
                f"{type(module).__name__} turns queries and keys by their positions (rotary), which projections of a pattern's "
                "own would miss; set global_projections=False or relay_projections=False"
            )
    weight = next(module.parameters())
    _refuse_quantized(module, weight)
    module.sparse_state = state.to(device=weight.device, dtype=weight.dtype)
    module.register_forward_pre_hook(_hand_over_hidden_states, with_kwargs=True)
    return True


def _refuse_quantized(module: nn.Module, weight: Tensor) -> None:
    """Refuse to start weights of a pattern beside quantized ones, whose dtype and numbers are not those of the layer."""
    if weight.dtype.itemsize < 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} is quantized ({weight.dtype}), and its pattern owns weights that start from plain ones; "
            "convert the plain checkpoint first, then load the sparse one quantized"
        )


def _sizes(module: nn.Module) -> dict[str, int]:
    """Return the sizes of a self-attention module that weights of a pattern are made for."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    width: Any = next((held for held in (getattr(module, name, None) for name in names) if held), None)
    fused: Any = getattr(module, "embed_dim", None), getattr(module, "num_heads", None)
    if all((*fused, width)):
        return {"hidden_size": fused[0], "num_heads": fused[1], "num_key_value_heads": fused[1], "head_dim": width}
    query, key, _ = projections(module)
    return {
        "hidden_size": query.in_features,
        "num_heads": query.out_features // width,
        "num_key_value_heads": key.out_features // width,
        "head_dim": width,
    }


def _hand_over_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep what the attention layer is given until its attention function has read it."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    module._sparse_hidden = hidden_states
