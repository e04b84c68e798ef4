"""The attention modules of a model: which are self-attention, in what order, and what each is tagged with."""

import dis
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

# of our attention
NAME = "hf_sparse"
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
        is_closed: whether what the model is given beside its own arguments does not come this far.
    """

    pattern: Pattern | None
    index: int
    stack: str = ""
    band: Band = EVERYTHING
    is_closed: bool = False


def tag_of(module: nn.Module) -> LayerTag | None:
    """Return what a module is tagged with; None outside of sparse models."""
    tag: Any = getattr(module, "_sparse", None)
    return tag if isinstance(tag, LayerTag) else None


def takes_documents(pattern: Pattern) -> bool:
    """Say whether rows of several documents can be served."""
    return pattern.added_scores(1) is None and (pattern.takes_segments or not pattern.has_nodes)


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
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict)) and not _passes_on(module):
                return type(module).__name__
    return None


def _passes_on(module: nn.Module) -> bool:
    """Say whether a module takes further arguments and reads them: Nemotron's layers take them and leave it at that."""
    # a compiled module stands around it
    module = getattr(module, "_orig_mod", module)
    function = inspect.unwrap(module.__dict__.get("forward", type(module).forward))
    takes = inspect.signature(function).parameters.values()
    name = next((one.name for one in takes if one.kind is inspect.Parameter.VAR_KEYWORD), None)
    loads = (one for one in dis.get_instructions(function) if one.opname.startswith("LOAD"))
    return name is not None and any(
        name in (one.argval if isinstance(one.argval, tuple) else [one.argval]) for one in loads
    )


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
    closed = model.__dict__["_sparse_closed"] = closed_module(model)
    fresh = []
    for stack, index, _, module in modules:
        pattern = entry.pattern_of(stack, index)
        window = window_of(model.config, numbered(module, index), is_causal=is_causal(module))
        band = EVERYTHING if pattern is not None or window is None else Band(radius=window - 1)
        set_tag(module, LayerTag(pattern, index, stack, band, closed is not None))
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


def check_states(model: nn.Module, entry: Entry) -> None:
    """Check that the weights that patterns own can be made for a model, before anything of it is changed.

    Raises:
        UnsupportedModelError: if a layer is of a kind that they do not fit, is quantized, or is spread over ranks.
    """
    for stack, index, _, module in self_attention_modules(model):
        pattern = entry.pattern_of(stack, index)
        state = None if pattern is None else made_state(module, pattern)
        if isinstance(state, GlobalProjections):
            for source in projections(module):
                _refuse_quantized(module, source.weight)
        if state is not None and ranks_of(model) > 1:
            _refuse_spread(index, state)


def ranks_of(model: nn.Module) -> int:
    """Return over how many ranks transformers' tensor parallelism spreads a model."""
    return getattr(model, "_tp_size", None) or 1


def _refuse_spread(index: int, state: nn.Module) -> None:
    raise UnsupportedModelError(
        f"layer {index}: its pattern owns weights ({type(state).__name__}), which tensor parallelism does not spread; load "
        "the model without tp_plan, or convert it with a pattern that owns none"
    )


def share_heads_(model: nn.Module) -> None:
    """Tell each layer which of its heads are here, where transformers' tensor parallelism spreads them over ranks.

    Raises:
        UnsupportedModelError: if a layer owns weights of its pattern, which transformers does not spread.
    """
    size = ranks_of(model)
    if size == 1:
        return
    mesh: Any = model._device_mesh
    rank = (mesh if mesh.ndim == 1 else mesh["tp"]).get_local_rank()
    for _, index, _, module in self_attention_modules(model):
        if isinstance(getattr(module, "sparse_state", None), nn.Module):
            _refuse_spread(index, module.sparse_state)  # type: ignore[arg-type]
        module.__dict__["_sparse_share"] = rank, size, num_heads_of(module, model.config)


def heads_here(module: Any, count: int) -> tuple[int, int | None]:
    """Return the first of ``count`` heads that are here and how many the layer has; 0 and None where all are here.

    Raises:
        ValueError: if they are neither all nor this rank's share.
    """
    rank, size, total = module.__dict__.get("_sparse_share", (0, 1, count))
    if count == total:
        return 0, None
    if count * size != total:
        raise ValueError(f"{type(module).__name__}: {count} of {total} heads are no even share of {size} ranks")
    return rank * count, total


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
                target = getattr(module.sparse_state, name)
                for parameter, value in ((target.weight, source.weight), (target.bias, source.bias)):
                    if not getattr(parameter, "_is_hf_initialized", False):
                        _refuse_quantized(module, source.weight)
                        parameter.copy_(value) if value is not None else parameter.zero_()
            for name in state.zeros:
                for parameter in getattr(state, name).parameters():
                    if not getattr(parameter, "_is_hf_initialized", False):
                        parameter.zero_()


def _own_state(module: nn.Module, pattern: Pattern) -> bool:
    if isinstance(getattr(module, "sparse_state", None), nn.Module):
        return False
    state = made_state(module, pattern)
    if state is None:
        return False
    weight = next(module.parameters())
    dtype = torch.get_default_dtype() if _is_quantized(weight) else weight.dtype
    module.sparse_state = state.to(device=weight.device, dtype=dtype)
    hand_over = _pass_hidden_states_on if _passes_on(module) else _keep_hidden_states
    module.register_forward_pre_hook(hand_over, with_kwargs=True)
    return True


def made_state(module: nn.Module, pattern: Pattern) -> nn.Module | None:
    """Return the weights that a pattern owns on a self-attention module, or None; the module stays as it is.

    Raises:
        UnsupportedModelError: if the module is of a kind that they do not fit.
    """
    if pattern.make_state(hidden_size=1, num_heads=1, num_key_value_heads=1, head_dim=1) is None:
        return None
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
    made: nn.Module = state
    return made


def _refuse_quantized(module: nn.Module, weight: Tensor) -> None:
    """Refuse to start weights of a pattern as copies of quantized ones, whose numbers are not those of the layer."""
    if _is_quantized(weight):
        raise UnsupportedModelError(
            f"{type(module).__name__} is quantized ({weight.dtype}), and its pattern owns weights that start from plain ones; "
            "convert the plain checkpoint first, then load the sparse one quantized"
        )


def _is_quantized(weight: Tensor) -> bool:
    # of four bits in a wider dtype there is a state beside
    return not weight.is_floating_point() or weight.dtype.itemsize < 2 or hasattr(weight, "quant_state")


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


def _pass_hidden_states_on(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give what the attention layer is given to its attention function too, unless that is a dense one."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    return (args, {**kwargs, "sparse_hidden_states": hidden_states}) if _is_ours(module) else (args, kwargs)


def _keep_hidden_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Keep what the attention layer is given until its attention function has read it, where nothing is passed on to that."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    if _is_ours(module):
        module._sparse_hidden = hidden_states


def _is_ours(module: nn.Module) -> bool:
    return str(getattr(module.config, "_attn_implementation", NAME)).startswith(NAME)
