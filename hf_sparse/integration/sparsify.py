"""Making a model or a config sparse."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from hf_sparse.errors import UnsupportedModelError
from hf_sparse.integration.auto import SparseModelMixin, sparse_config_class, sparse_model_class
from hf_sparse.integration.buckets import give_distances_
from hf_sparse.integration.entry import Entry, make_entry
from hf_sparse.integration.families import family_of
from hf_sparse.integration.hub import clean_token
from hf_sparse.integration.layers import (
    NAME,
    attach,
    check_entry,
    check_states,
    self_attention_modules,
    share_heads_,
    start_states,
)
from hf_sparse.integration.nodes import add_nodes, reset_nodes, take_nodes
from hf_sparse.integration.positions import wanted_limits
from hf_sparse.integration.support import check_no_position_bias, check_obeys
from hf_sparse.integration.vision import fitted_entry
from hf_sparse.integration.windows import reach_of, windowed_layers
from hf_sparse.patterns import Pattern


def sparsify_(
    model: PreTrainedModel, pattern: Pattern, *, layers: Mapping[int | str, Pattern | str] | None = None
) -> PreTrainedModel:
    """Make a model sparse in place.

    Its class and its config's class become the sparse ones, so ``save_pretrained`` keeps the pattern. Weights that the
    pattern owns (Longformer's global projections) start as copies of the layers' own.

    Args:
        model: a transformers model, dense or already sparse (its pattern is then replaced).
        pattern: serves every layer not named in ``layers``.
        layers: maps a layer ("3", "encoder.3", "decoder.3" or a number) to a pattern or to "dense".

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: if the model would ignore the pattern; says why.
        ValueError: if a layer is unknown or the pattern does not fit the model.
        TypeError: if ``model`` is no transformers model or ``pattern`` no pattern.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"sparsify_ takes a transformers model, got {type(model).__name__}")
    entry = make_entry(pattern, layers)
    dense: Any = type(model).__mro__[2] if isinstance(model, SparseModelMixin) else type(model)
    modules = self_attention_modules(model)
    if not isinstance(model, SparseModelMixin):
        if model.config.model_type not in CONFIG_MAPPING:
            raise UnsupportedModelError(f"model type {model.config.model_type!r} is unknown to transformers")
        check_obeys(dense, model.config)
    entry = _fitted(entry, model.config)
    check_entry(entry, modules, model.config)
    check_states(model, entry)
    for *_, module in modules:
        if hasattr(module, "sparse_state"):
            del module.sparse_state
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()
    take_nodes(model)
    sparse: Any = sparse_model_class(dense)
    _give_own_config(model)
    model.config.__class__ = sparse.config_class
    model.config.sparse_attention = entry.to_dict()
    model.__class__ = sparse
    # transformers knows which outputs a class can record from its __init__, which has run as the dense class
    key: Any = str(sparse) if type(_CAN_RECORD_REGISTRY) is dict else model
    _CAN_RECORD_REGISTRY[key] = model._can_record_outputs
    # adapters would be saved as those of the dense checkpoint that it came from
    model.name_or_path = ""
    model.set_attn_implementation(NAME)
    start_states(attach(model, entry))
    share_heads_(model)
    give_distances_(model, NAME)
    add_nodes(model)
    reset_nodes(model)
    return model


def _fitted(entry: Entry, config: Any) -> Entry:
    """Return an entry with what its patterns leave open, and with patterns of their own for the layers of a decoder.

    Raises:
        ValueError: if a pattern is for another grid of pixels, or would leave a decoder nothing to read.
    """
    entry = _with_own_windows(fitted_entry(entry, config), config)
    if not getattr(config, "is_encoder_decoder", False):
        return entry
    named = dict(entry.layers)
    # nodes would know what comes
    pattern = None if entry.pattern.has_lasting_nodes else entry.pattern.for_decoder()
    if pattern == entry.pattern:
        return entry
    keys = [f"decoder.{layer}" for layer in range(_decoder_layers(config))]
    left = tuple((key, pattern) for key in keys if key not in named)
    if pattern is not None and left and not pattern.is_content_based and not pattern.density(2, is_causal=True):
        raise ValueError(
            f"pattern {entry.pattern.key!r} has global tokens alone, which are the encoder's, so that the decoder would read "
            "nothing; unite it with another, such as hf_sparse.pattern('band'), or give the decoder layers of their own"
        )
    return Entry(entry.pattern, (*entry.layers, *left))


def _with_own_windows(entry: Entry, config: Any) -> Entry:
    """Return an entry in which layers with a sliding window of their own keep it, in a model where others have none.

    That is where no pattern is named for the layer, and the one for all would read beyond the window.
    """
    pattern, named = entry.pattern, dict(entry.layers)
    length = getattr(config, "max_position_embeddings", None)
    kept = []
    for layer in windowed_layers(config):
        window = int(config.sliding_window)
        if str(layer) in named or (length is not None and length <= window):
            continue
        scope: dict[str, Any] = {"heads": config.num_attention_heads, "layer": layer, "length": length or 2 * window}
        reach = reach_of(pattern, is_causal=False, **scope)
        if pattern.has_global_tokens or reach is None or reach >= window:
            kept.append((str(layer), None))
    return Entry(pattern, (*entry.layers, *kept))


def _decoder_layers(config: Any) -> int:
    """Return the layers of a decoder beside an encoder: BART and T5 name them differently."""
    layers: Any = getattr(config, "decoder_layers", None) or getattr(config, "num_decoder_layers", 0)
    return int(layers)


def _give_own_config(model: PreTrainedModel) -> None:
    """Give a model and its modules a copy of their config: other models may share the object."""
    copies: dict[int, Any] = {}
    held = [(module, module.__dict__.get("config")) for module in model.modules()]
    model.config = copy.deepcopy(model.config, copies)
    for module, config in held:
        if id(config) in copies:
            module.config = copies[id(config)]


def _made_config(cls: Any, fields: dict[str, Any], positions: str | None) -> PreTrainedConfig:
    """Return a config of a class; what a way to lengthen positions makes of it may be none that the model takes."""
    try:
        # a config may change what it is given
        made: PreTrainedConfig = cls.from_dict(copy.deepcopy(fields))
    except Exception as error:
        if positions is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"positions={positions!r} does not fit {cls.dense_model_type} ({reason}); leave it out"
        ) from error
    wanted = fields.get("rope_parameters")
    if positions is not None and wanted is not None and made.rope_parameters != wanted:
        raise ValueError(
            f"positions={positions!r} does not fit {cls.dense_model_type}, which makes something else of it "
            f"({made.rope_parameters['rope_type']}); leave it out"
        )
    return made


def sparse_config(
    source: str | os.PathLike[str] | PreTrainedConfig,
    pattern: Pattern,
    *,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
    **kwargs: Any,
) -> PreTrainedConfig:
    """Return a sparse config for ``AutoModel.from_pretrained(source, config=...)``.

    Args:
        source: a dense checkpoint (a folder or a Hub id) or its config.
        pattern: serves every layer not named in ``layers``.
        max_length: tokens of the longest text wanted; loading then tiles a table of positions. None keeps the length.
        image_size: for a model that reads images, pixels of the largest one wanted, or its (height, width); loading then
            interpolates the position table. None keeps the size.
        positions: how positions serve a longer text. A learned table: "tile" (None as well) or "interpolate". Rotary ones:
            "none" (None as well) leaves them as they are, "linear", "ntk", "yarn" or "dynamic" scale them.
        layers: maps a layer to a pattern or to "dense".
        kwargs: passed to ``AutoConfig.from_pretrained`` (``revision``, ``token`` ...).

    Raises:
        UnsupportedModelError: if the model type cannot be made sparse.
        ValueError: if ``max_length``, ``image_size`` or ``positions`` does not fit the checkpoint.
    """
    if isinstance(source, PreTrainedConfig):
        dense = source
    else:
        dense = AutoConfig.from_pretrained(source, **{**kwargs, "token": clean_token(kwargs.get("token"))})
    entry = make_entry(pattern, layers)
    if getattr(dense, "sparse_attention", None) is not None:
        raise ValueError("the source is sparse already; load it, or use sparsify_ to give it another pattern")
    check_no_position_bias(dense)
    cls = sparse_config_class(dense.model_type)
    wanted = wanted_limits(dense, max_length=max_length, image_size=image_size, positions=positions)
    fields = {**dense.to_dict(), **wanted, "model_type": cls.model_type, "sparse_attention": entry.to_dict()}
    made = _made_config(cls, fields, positions)
    entry = _fitted(entry, made)
    made.sparse_attention = entry.to_dict()
    length = family_of(made).length(made) if wanted else None
    if getattr(made, "is_encoder_decoder", False):
        # how many layers and heads each stack has is known where the model is
        return made
    sizes = {
        "num_layers": getattr(dense, "num_hidden_layers", None),
        "num_heads": getattr(dense, "num_attention_heads", None),
    }
    for one in {entry.pattern, *(pattern for _, pattern in entry.layers if pattern is not None)}:
        if None not in sizes.values():
            one.check(**sizes, length=length)  # type: ignore[arg-type]
    return made
