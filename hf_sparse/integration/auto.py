"""The ``Sparse*`` classes, made from the dense ones and registered with the Auto classes."""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, masking_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_sparse.integration.buckets import give_distances_
from hf_sparse.integration.entry import read_entry
from hf_sparse.integration.families import FAMILIES
from hf_sparse.integration.global_defaults import default_global_mask
from hf_sparse.integration.layers import (
    NAME,
    attach,
    is_causal,
    self_attention_modules,
    share_heads_,
    start_states,
    tag_of,
    takes_documents,
)
from hf_sparse.integration.mask import documents_of
from hf_sparse.integration.nodes import add_nodes, reset_nodes
from hf_sparse.integration.positions import lengthen_, limits
from hf_sparse.integration.pushing import push_model
from hf_sparse.integration.remote_code import auto_map_of, write_code
from hf_sparse.patterns import Pattern

# what sparse attention takes beside a model's own inputs, all [batch, tokens]; and what else to do where it cannot be passed on
_TOKEN_INPUTS = {
    "global_attention_mask": "; name the global tokens in the pattern",
    "segment_ids": "",
    "document_ids": "; give each document a row of its own",
}
_LANGUAGE_MODEL_HEADS = ("ForMaskedLM", "ForCausalLM", "LMHeadModel", "ForPreTraining", "ForConditionalGeneration")


class SparseConfigMixin:
    """What a sparse config adds to the dense one: our attention unless another is asked for."""

    dense_model_type: str

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["attn_implementation"] = kwargs.get("attn_implementation") or NAME
        super().__post_init__(**kwargs)  # type: ignore[misc]
        register_models(type(self))  # type: ignore[arg-type]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: the class is registered, and its code is not to be copied into checkpoints."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as any config; one that came with code (``trust_remote_code``) brings it along."""
        has_code = bool(getattr(self, "auto_map", None))
        if has_code:
            self.auto_map = auto_map_of(type(self))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if has_code:
            write_code(Path(save_directory), type(self))


class SparseModelMixin:
    """What a sparse model adds to the dense one: tags and weights on its attention layers."""

    _keys_to_ignore_on_load_missing: Any

    def post_init(self) -> None:
        entry = read_entry(self.config)  # type: ignore[attr-defined]
        self._sparse_fresh = attach(self, entry)  # type: ignore[arg-type]
        give_distances_(self, NAME)  # type: ignore[arg-type]
        add_nodes(self)  # type: ignore[arg-type]
        super().post_init()  # type: ignore[misc]
        # weights that are not in a dense checkpoint are not missing: they start as copies
        ours = (r"\.sparse_state\.", r"(^|\.)sparse_nodes\.")
        self._keys_to_ignore_on_load_missing = {*(self._keys_to_ignore_on_load_missing or ()), *ours}

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        start_states(self._sparse_fresh)
        reset_nodes(self)  # type: ignore[arg-type]

    def create_masks_for_generate(self, **given: Any) -> Any:
        """Leave the padding mask as it is where a static cache has transformers make masks ahead: the model makes its own."""
        if self.config._attn_implementation == NAME:  # type: ignore[attr-defined]
            return given["attention_mask"]
        make = getattr(super(), "create_masks_for_generate", masking_utils.create_masks_for_generate)
        return make(**given)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: transformers would take another attention in the place of the sparse one.

        Raises:
            ValueError: unless the model was loaded, or set, to be dense.
        """
        if self.config._attn_implementation == NAME:  # type: ignore[attr-defined]
            raise ValueError(
                "continuous batching has attention of its own, which is dense; use generate(), or "
                "set_attn_implementation('sdpa') for the dense model"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Leave the decoder ids of Whisper as they are, which transformers tells by the type of its config."""
        held = model_kwargs.get("decoder_input_ids")
        if self.config.dense_model_type == "whisper" and held is not None:  # type: ignore[attr-defined]
            return model_kwargs.pop("decoder_input_ids"), model_kwargs
        make = super()._prepare_decoder_input_ids_for_generation  # type: ignore[misc]
        return make(batch_size, model_input_name, model_kwargs, *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as any model; with ``push_to_hub`` it is pushed as :meth:`push_to_hub` does, with the same card."""
        names = ("repo_id", "commit_message", "create_pr", "private") if push_to_hub else ()
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            given |= {name: kwargs[name] for name in ("token", "max_shard_size") if name in kwargs}
            self.push_to_hub(given.pop("repo_id", Path(save_directory).name), **given)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Sequence[str] = (),
    ) -> Any:
        """Push as any model, with a card that says who reads whom and how to load it, and a picture of that.

        Raises:
            PushError: if the Hub cannot be reached or refuses.
        """
        return push_model(
            self,
            repo_id,
            message=commit_message or "Upload model",
            description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=[tags] if isinstance(tags, str) else tags,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load as any model; a dense checkpoint that is shorter than ``config`` asks for gets longer positions."""
        loaded = cls._loaded(super().from_pretrained, pretrained_model_name_or_path, *args, config=config, **kwargs)  # type: ignore[misc]
        share_heads_(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @staticmethod
    def _loaded(load: Any, pretrained_model_name_or_path: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
        if not isinstance(config, PreTrainedConfig):
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        hub = {
            key: kwargs[key]
            for key in ("revision", "token", "cache_dir", "local_files_only", "subfolder")
            if key in kwargs
        }
        held, _ = PreTrainedConfig.get_config_dict(pretrained_model_name_or_path, **hub)
        family = FAMILIES.get(config.dense_model_type)
        if "sparse_attention" in held or family is None or not family.positions:
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        before = CONFIG_MAPPING[config.dense_model_type].from_dict(held)
        if family.length(before) >= family.length(config):
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        short = copy.deepcopy(config)
        for field, value in limits(before).items():
            setattr(short, field, value)
        loaded = load(pretrained_model_name_or_path, *args, config=short, **kwargs)
        lengthen_(loaded[0] if isinstance(loaded, tuple) else loaded, config)
        return loaded


@functools.cache
def sparse_config_class(model_type: str) -> type[PreTrainedConfig]:
    """Return the sparse config class of a dense model type, registered with ``AutoConfig``."""
    dense = CONFIG_MAPPING[model_type]
    name = _sparse_name(model_type)
    namespace = {"model_type": name, "dense_model_type": model_type, "__module__": __name__}
    cls = type(f"Sparse{dense.__name__}", (SparseConfigMixin, dense), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)
    AutoConfig.register(name, cls, exist_ok=True)
    _share_weight_names(model_type, name)
    return cls


@functools.cache
def sparse_model_class(dense: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the sparse class of a dense model class."""
    config_class = sparse_config_class(dense.config_class.model_type)  # type: ignore[union-attr]
    namespace: dict[str, Any] = {
        "config_class": config_class,
        "__module__": __name__,
        "__doc__": dense.__doc__,
        "forward": _forward_of(dense),
    }
    if not dense.__name__.endswith(_LANGUAGE_MODEL_HEADS):
        # Trainer would multiply the loss of such heads by the number of processes
        namespace["accepts_loss_kwargs"] = False
    cls = type(f"Sparse{dense.__name__}", (SparseModelMixin, dense), namespace)
    setattr(sys.modules[__name__], cls.__name__, cls)
    _share_weight_names(dense.__name__, cls.__name__)
    if dense.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # Trainer looks names up there to smooth the labels of next tokens
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config_class.model_type] = cls.__name__
    return cls


def _share_weight_names(dense: str, sparse: str) -> None:
    """Let a sparse type or class read and write the names of weights in files that the dense one does.

    Where checkpoints hold other names than a class has (ViT), transformers keeps the renaming by type or by class.
    """
    mapping = get_checkpoint_conversion_mapping(dense)
    if mapping is not None:
        register_checkpoint_conversion_mapping(sparse, mapping, overwrite=True)


@functools.cache
def register_models(config_class: type[PreTrainedConfig]) -> None:
    """Register the sparse classes of one model type with every Auto class that serves the dense one."""
    dense = CONFIG_MAPPING[config_class.dense_model_type]  # type: ignore[attr-defined]
    for name in modeling_auto.__dict__:
        auto: Any = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or dense not in mapping:
            continue
        held = mapping[dense]
        is_choice = isinstance(held, (tuple, list))
        made = tuple(sparse_model_class(cls) for cls in held) if is_choice else sparse_model_class(held)
        # several classes for one head (DeiT): the architectures of a checkpoint choose
        mapping.register(config_class, made, exist_ok=True)


def register_configs() -> None:
    """Let ``AutoConfig`` know the sparse config of every model type; model classes follow when a config is first used."""
    if not isinstance(CONFIG_MAPPING._extra_content, _SparseConfigs):
        CONFIG_MAPPING._extra_content = _SparseConfigs(CONFIG_MAPPING._extra_content)


class _SparseConfigs(dict[str, type[PreTrainedConfig]]):
    """What ``AutoConfig`` knows beside transformers' own types; sparse ones are made when they are first asked for."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _dense_types()

    def __missing__(self, name: str) -> type[PreTrainedConfig]:
        return sparse_config_class(_dense_types()[name])


@functools.cache
def _dense_types() -> dict[str, str]:
    """Return the dense model type of every sparse one."""
    return {_sparse_name(model_type): model_type for model_type in CONFIG_MAPPING._mapping}


def _sparse_name(model_type: str) -> str:
    return f"sparse_{model_type.replace('-', '_')}"


def __getattr__(name: str) -> Any:
    """Return a sparse class by its name: a process that unpickles a model has not made it yet."""
    dense: Any = getattr(transformers, name.removeprefix("Sparse"), None) if name.startswith("Sparse") else None
    is_model = inspect.isclass(dense) and issubclass(dense, PreTrainedModel)
    if is_model and dense.config_class is not None:
        return sparse_model_class(dense)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _forward_of(dense: type[PreTrainedModel]) -> Callable[..., Any]:
    """Return a forward with what sparse attention takes in its signature, where ``Trainer`` looks for columns to keep."""
    signature = inspect.signature(dense.forward)
    parameters = list(signature.parameters.values())
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
        for name in _TOKEN_INPUTS
    ]
    names = [parameter.name for parameter in parameters[1:]]
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_sparse = self.config._attn_implementation == NAME
        if is_sparse and kwargs.get("output_attentions"):
            raise ValueError(
                "sparse attention keeps no attention weights; load the model with attn_implementation='eager' to see those of "
                "the dense model it came from"
            )
        held = {name: kwargs.pop(name, None) for name in _TOKEN_INPUTS}
        if held["document_ids"] is not None and not is_sparse:
            raise ValueError(
                f"document_ids reach no attention with attn_implementation={self.config._attn_implementation!r}: documents "
                "would read one another; load the model with 'hf_sparse', or give each document a row of its own"
            )
        if held["document_ids"] is not None and getattr(self.config, "is_encoder_decoder", False):
            raise ValueError(
                f"{type(self).__name__} reads all documents of a row from its decoder; give each document a row of its own"
            )
        given = dict(zip(names, args, strict=False)) | kwargs
        if held["global_attention_mask"] is None and is_sparse:
            held["global_attention_mask"] = _default_mask(self, given)
        if held["document_ids"] is None and is_sparse:
            held["document_ids"] = _packed_documents(self, given)
        for name, value in held.items():
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.dim() < 2:
                raise ValueError(f"{name} must be a tensor [batch, tokens], got {value!r}")
            if self.__dict__.get("_sparse_closed") is not None:
                raise ValueError(
                    f"{type(self).__name__} cannot be given {name}: {self._sparse_closed} of transformers "
                    f"{transformers.__version__} passes it on to no attention{_TOKEN_INPUTS[name]}"
                )
            kwargs[name] = value.flatten(0, -2)
        if is_sparse and torch.compiler.is_compiling() and self.__dict__.get("_sparse_closed") is None:
            kwargs["packing_is_told"] = True
        return dense.forward(self, *args, **kwargs)

    forward.__signature__ = signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])  # type: ignore[attr-defined]
    return forward


def _default_mask(model: Any, given: dict[str, Any]) -> Tensor | None:
    inputs = {name: given.get(name) for name in ("input_ids", "inputs_embeds", "pixel_values")}
    if not any(isinstance(value, Tensor) for value in inputs.values()):
        return None
    mask = given.get("attention_mask")
    return default_global_mask(type(model).__name__, model.config, _patterns_of(model), attention_mask=mask, **inputs)


def _patterns_of(model: Any) -> list[Pattern]:
    """Return the patterns of a model's layers, in order."""
    tags = [tag_of(module) for *_, module in self_attention_modules_cached(model)]
    return [tag.pattern for tag in tags if tag is not None and tag.pattern is not None]


def _packed_documents(model: Any, given: dict[str, Any]) -> Tensor | None:
    """Return the documents of rows whose position ids start over; transformers looks for such only where it makes no cache.

    While compiling nobody knows whether any do: documents are returned as if, and a model that could not honour them checks
    when it runs.
    """
    positions, tokens = given.get("position_ids"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    is_other = given.get("attention_mask") is not None or given.get("past_key_values") is not None
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor) or is_other:
        return None
    if positions.dim() == 3 and positions.shape[0] == 4:
        # those of the text, before those in time, height and width
        positions = positions[0]
    is_compiling = torch.compiler.is_compiling()
    # where it makes no cache, transformers tells the mask by a rule of its own, which a compiled mask does not
    is_told = is_compiling and not given.get("use_cache", getattr(model.config, "use_cache", False))
    is_told = is_told and any(is_causal(module) for *_, module in self_attention_modules_cached(model))
    documents = documents_of(positions, tokens.shape[0], tokens.shape[1], at_every_step=is_told)
    if documents is None or not is_compiling:
        return documents if documents is not None and bool(documents.any()) else None
    if model.__dict__.get("_sparse_closed") is None and all(map(takes_documents, _patterns_of(model))):
        return documents
    torch._assert_async(
        (documents == documents[:, :1]).all(),
        f"position_ids say that rows are packed, which {type(model).__name__} cannot honour; give each document its own row",
    )
    return None


def self_attention_modules_cached(model: nn.Module) -> list[tuple[str, int, str, nn.Module]]:
    """Return the self-attention modules of a model, found once."""
    held = model.__dict__.get("_sparse_modules")
    if held is None:
        held = model.__dict__["_sparse_modules"] = self_attention_modules(model)
    return held
