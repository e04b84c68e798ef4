"""What a checkpoint becomes: its sparse config, its classes, and the names of the weights it gains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from hf_sparse.conversion.names import renamings_of
from hf_sparse.conversion.source import Checkpoint, read_config
from hf_sparse.errors import ConversionError, UnsupportedModelError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.density import Layer, layer_of, mean_density
from hf_sparse.integration.entry import Entry, make_entry, read_entry
from hf_sparse.integration.families import FAMILIES, Family, family_of, parts_of
from hf_sparse.integration.layers import check_entry, projections, self_attention_modules
from hf_sparse.integration.nodes import Nodes
from hf_sparse.integration.positions import METHOD_FIELD, limits
from hf_sparse.integration.sparsify import sparse_config
from hf_sparse.integration.support import check_dispatches, check_obeys
from hf_sparse.integration.vision import image_pixels, vision_family_of
from hf_sparse.patterns import Pattern
from hf_sparse.patterns.labels import RelativeLabels
from hf_sparse.patterns.projections import GlobalProjections
from hf_sparse.patterns.routing import Centroids

# transformers reads these from config.json too, and they would take our attention's place
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


@dataclass(frozen=True)
class Target:
    """What a checkpoint becomes.

    Attributes:
        dense_class: the class of the source's first known architecture.
        architectures: names for config.json.
        dense_config: the source's config.
        config: the sparse config.
        entry: which pattern serves which layer.
        layers: the self-attention layers of the model.
        length_before: longest input of the source, in tokens.
        length: longest input of the destination, in tokens.
        copies: maps the names of weights that are added to the names of those they start as copies of, as the class has them.
        fresh: shapes of the weights that are added as zeros, by their names in the class.
        centroids: shapes of what a calibration may set, by name in the class; added by a calibration alone.
        shapes: of the weights of the dense class, by name.
        table_shape: of the destination's table of positions; () where there is none.
        renamings: what transformers renames as it loads the dense class.
        tied: names of weights that are others under a second name, which a checkpoint need not hold.
    """

    dense_class: Any
    architectures: tuple[str, ...]
    dense_config: PreTrainedConfig
    config: PreTrainedConfig
    entry: Entry
    layers: tuple[Layer, ...]
    length_before: int
    length: int
    copies: dict[str, str]
    fresh: dict[str, tuple[int, ...]]
    centroids: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]
    table_shape: tuple[int, ...]
    renamings: tuple[Any, ...]
    tied: frozenset[str]

    def density(self, length: int) -> float:
        """Return the share of pairs that are read at a length, averaged over layers and heads."""
        patterns = ((layer, self.entry.pattern_of(layer.stack, layer.index)) for layer in self.layers)
        return mean_density(patterns, length)

    @property
    def model_type(self) -> str:
        """The dense model type."""
        return str(self.dense_config.model_type)

    def is_table(self, name: str) -> bool:
        """Say whether a weight, by its name in the class or in the checkpoint, is a table of positions."""
        suffix = family_of(self.dense_config).positions
        return bool(suffix) and f".{name}".endswith(f".{suffix}")

    @property
    def has_sines(self) -> bool:
        """Whether its tables of positions are sines and cosines, which the model can make by itself."""
        return getattr(family_of(self.dense_config), "kind", "") == "sinusoidal"

    def is_buffer(self, name: str) -> bool:
        """Say whether a tensor of the checkpoint is a buffer that older versions saved and no model reads."""
        family = family_of(self.dense_config)
        return isinstance(family, Family) and bool(family.buffers) and name.endswith(family.buffers)

    @property
    def beside(self) -> str:
        """Name in the class of the weight beside which new ones are put: the first table of positions, or the first of all."""
        return next((name for name in self.shapes if self.is_table(name)), next(iter(self.shapes)))

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows that layers of the source have, in tokens."""
        return tuple(layer.window for layer in self.layers if layer.window is not None)

    @property
    def rotary(self) -> dict[str, Any] | None:
        """What the config says of rotary positions where that is not what the source's says; else None."""
        held: dict[str, Any] | None = getattr(self.config, "rope_parameters", None)
        return None if held == getattr(self.dense_config, "rope_parameters", None) else held

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the destination's images, in pixels; None for text."""
        return None if vision_family_of(self.config) is None else image_pixels(self.config)

    @property
    def image_size_before(self) -> tuple[int, int] | None:
        """Height and width of the source's images, in pixels; None for text."""
        return None if vision_family_of(self.config) is None else image_pixels(self.dense_config)

    @property
    def base_prefix(self) -> str:
        """What stands before the names of the base model's weights in a model with a head."""
        return f"{self.dense_class.base_model_prefix}."

    def config_json(self, held: dict[str, Any], separator: int | None) -> dict[str, Any]:
        """Return what config.json is to hold.

        Args:
            held: what the source's holds; every field of it that is not ours stays.
            separator: id of the tokenizer's separator, for a config that does not name it; or None.
        """
        fields = limits(self.config)
        if hasattr(self.config, METHOD_FIELD):
            fields[METHOD_FIELD] = getattr(self.config, METHOD_FIELD)
        # a second name of a limit would be read as well
        second = {name for name, own in self.config.attribute_map.items() if own in fields}
        if "rope_parameters" in fields:
            # what older versions said instead
            second |= {"rope_theta", "rope_scaling", "rotary_pct", "rotary_emb_base"}
        # where a source lay is nobody's business
        left_out = {*_ATTENTION_KEYS, *second, "_name_or_path"}
        kept = {key: value for key, value in held.items() if key not in left_out}
        if kept.get("sep_token_id") is None and separator is not None:
            kept["sep_token_id"] = separator
        return {
            **kept,
            "architectures": [f"Sparse{name}" for name in self.architectures],
            "model_type": self.config.model_type,
            **fields,
            "sparse_attention": self.entry.to_dict(),
        }


def plan_target(
    checkpoint: Checkpoint,
    pattern: Pattern,
    *,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
) -> Target:
    """Say what a checkpoint becomes.

    Raises:
        UnsupportedModelError: if its model type cannot be converted; says why.
        ConversionError: if its config cannot be read.
        ValueError: if the pattern, a layer or the length does not fit it.
    """
    entry = make_entry(pattern, layers)
    dense_config = read_config(checkpoint)
    classes = _dense_classes(checkpoint, dense_config)
    # on the meta device: names and shapes without memory
    with torch.device("meta"):
        dense = _built(classes[0], dense_config, checkpoint)
    if not parts_of(dense_config):
        _check(check_dispatches, classes[0], dense_config)
    family = family_of(dense_config)
    if isinstance(family, Family) and family.kind == "learned":
        _check_positions(checkpoint, dense_config, counts_from_padding=family.counts_from_padding)
    _check(check_obeys, classes[0], dense_config)
    wanted: dict[str, Any] = {"max_length": max_length, "image_size": image_size, "positions": positions}
    config = sparse_config(dense_config, pattern, layers=layers, **wanted)
    entry = read_entry(config)
    with torch.device("meta"):
        model = sparse_model_class(classes[0])(config)
    copies = _copies(model)
    modules = self_attention_modules(model)
    length = family.length(config)
    check_entry(entry, modules, config, length=length)
    suffix = family.positions
    tables = [weight for name, weight in model.named_parameters() if suffix and name.endswith(suffix)]
    return Target(
        dense_class=classes[0],
        architectures=tuple(cls.__name__ for cls in classes),
        dense_config=dense_config,
        config=config,
        entry=entry,
        layers=tuple(layer_of(stack, index, module, config) for stack, index, _, module in modules),
        length_before=family.length(dense_config),
        length=length,
        copies=copies,
        fresh={
            f"{path}.{name}": tuple(weight.shape)
            for path, module in model.named_modules()
            if isinstance(module, Nodes | RelativeLabels | GlobalProjections)
            for name, weight in module.named_parameters()
            if f"{path}.{name}" not in copies
        },
        centroids={
            f"{path}.{name}": tuple(buffer.shape)
            for path, module in model.named_modules()
            if isinstance(module, Centroids)
            for name, buffer in module.named_buffers()
        },
        shapes={name: tuple(weight.shape) for name, weight in dense.state_dict().items()},
        table_shape=tuple(tables[0].shape) if tables else (),
        renamings=renamings_of(dense),
        tied=frozenset(dense.all_tied_weights_keys),
    )


def _built(cls: Any, config: PreTrainedConfig, checkpoint: Checkpoint) -> Any:
    """Return a model of a config, whose numbers may be such that none can be made."""
    try:
        return cls(config)
    # a size of 0, an unknown activation: each raises an error of its own kind
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConversionError(
            f"{checkpoint.folder / 'config.json'} describes no {config.model_type} that can be made "
            f"({type(error).__name__}: {reason}); fetch or save it again"
        ) from error


def _dense_classes(checkpoint: Checkpoint, config: PreTrainedConfig) -> list[Any]:
    """Return the classes that the source names and transformers has for its type; else the base class."""
    found = [getattr(transformers, name, None) for name in checkpoint.config.get("architectures") or []]
    known = [
        cls
        for cls in found
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.config_class is type(config)
    ]
    if known:
        return known
    base: Any = AutoModel._model_mapping.get(type(config), None)
    if base is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot be converted: transformers has no base model for it; "
            "hf-sparse support lists what converts"
        )
    return list(base) if isinstance(base, (tuple, list)) else [base]


def _check(check: Callable[[Any, Any], None], dense: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Check that a model would obey a pattern; where no row tells about it, a tiny copy that does not run is a refusal too."""
    try:
        check(dense, config)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{error}; hf-sparse support lists what converts") from error
    except Exception as error:
        if config.model_type in FAMILIES:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"model type {config.model_type!r} cannot be converted: a tiny copy, which would show whether it obeys a pattern, "
            f"does not run ({reason}); hf-sparse support lists what converts"
        ) from error


def _check_positions(checkpoint: Checkpoint, config: Any, *, counts_from_padding: bool) -> None:
    kind = checkpoint.config.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        raise UnsupportedModelError(
            f"{checkpoint.name} has position_embedding_type {kind!r}, which transformers {transformers.__version__} no longer "
            "computes; only checkpoints with 'absolute' positions can be converted"
        )
    if counts_from_padding and not isinstance(config.pad_token_id, int):
        raise ConversionError(
            f"{checkpoint.name}: pad_token_id must be a number, got {config.pad_token_id!r}: positions are counted from it; "
            "set it in config.json"
        )


def _copies(model: nn.Module) -> dict[str, str]:
    """Return the weights that patterns own and that start as copies, each with the weight it is a copy of.

    The others start as zeros, among them biases of which the layer has none.
    """
    names = {id(module): name for name, module in model.named_modules()}
    copies = {}
    for _, _, path, module in self_attention_modules(model):
        state = getattr(module, "sparse_state", None)
        # what else patterns own starts by itself when it is loaded
        if not isinstance(state, GlobalProjections):
            continue
        own = dict(zip(("query", "key", "value"), projections(module), strict=True))
        for key in state.state_dict():
            part, _, kind = key.rpartition(".")
            if part not in state.zeros and kind in dict(own[part].named_parameters()):
                copies[f"{path}.sparse_state.{key}"] = f"{names[id(own[part])]}.{kind}"
    return copies
