"""Sparse model types that transformers has itself, and the dense types they are otherwise equal to.

Longformer is a RoBERTa, LED a BART, BigBird a BERT and BigBird-Pegasus a Pegasus, each with other attention: by renaming, one
is read as the other.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import hf_sparse
from hf_sparse.conversion.shards import StoredTensor
from hf_sparse.errors import UnsupportedModelError
from hf_sparse.patterns import Pattern

_HEADS = ("Model", "ForMaskedLM", "ForTokenClassification", "ForMultipleChoice")
_LAYER = r"(encoder\.layers\.\d+\.self_attn\.)"


@dataclass(frozen=True)
class Kin:
    """A sparse model type of transformers' own, and the dense type it is read as.

    Attributes:
        names: how the names of the classes of both begin, the sparse type's first.
        dense_type: model type of the dense one.
        heads: how the names of classes end that both have, with equal heads.
        renamings: of weights, in order: what stands in a name of the sparse type, and what in the dense type's.
        dropped: fields of the config that the dense one has not.
        pattern: what the config says of the pattern; None where it asks for full attention.
        not_kept: what the dense type cannot do, by field of the config: the one value that can be read.
        shortest: the tokens up to which the class attends fully, whatever its config says.
        compared_tokens: tokens of a text that shows its pattern.
        keeps_length: whether its positions, which the dense type would make anew for longer inputs, cannot be lengthened.
    """

    names: tuple[str, str]
    dense_type: str
    heads: tuple[str, ...]
    renamings: tuple[tuple[str, str], ...]
    dropped: tuple[str, ...]
    pattern: Callable[[Any], Pattern | None]
    not_kept: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shortest: Callable[[Any], int] = lambda config: 0
    compared_tokens: Callable[[Any], int] = lambda config: 2 * max(_windows(config))
    keeps_length: bool = False

    def dense_class(self, architecture: str) -> str | None:
        """Return what the dense type calls a class; None where it has no such class."""
        head = architecture.removeprefix(self.names[0])
        return self.names[1] + head if architecture.startswith(self.names[0]) and head in self.heads else None

    def dense_name(self, name: str) -> str:
        """Return what the dense type calls a weight."""
        for pattern, replacement in self.renamings:
            name = re.sub(pattern, replacement, name)
        return name

    def dense_tensors(self, tensor: StoredTensor, config: Any) -> Iterator[StoredTensor]:
        """Yield a weight as the dense type has it, and with a projection that has no bias one of zeros."""
        name = self.dense_name(tensor.name)
        is_table = self.dense_type == "bart" and name.endswith("embed_positions.weight")
        rows = _bart_rows(tensor, config) if is_table else None
        yield _renamed(tensor, name, rows)
        if not getattr(config, "use_bias", True) and re.search(r"attn\.(q|k|v|out)_proj\.weight$", name):
            yield _zeros(tensor, name.removesuffix("weight") + "bias")


@dataclass(frozen=True)
class RenamedTensor(StoredTensor):
    """A tensor under another name; ``start`` and ``stop`` say its length alone.

    Attributes:
        origin: the tensor.
        rows: which of its rows are its own, in order; None for all as they are.
    """

    origin: StoredTensor
    rows: tuple[int, ...] | None = None

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes, a few megabytes or a row at a time."""
        if self.rows is None:
            yield from self.origin.chunks()
            return
        held = b"".join(self.origin.chunks())
        width = len(held) // self.origin.shape[0]
        for row in self.rows:
            yield held[row * width : (row + 1) * width]


@dataclass(frozen=True)
class ZeroTensor(StoredTensor):
    """A tensor of zeros that lies nowhere."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the tensor's bytes."""
        yield bytes(self.stop)


def _renamed(tensor: StoredTensor, name: str, rows: tuple[int, ...] | None) -> RenamedTensor:
    shape = tensor.shape if rows is None else (len(rows), *tensor.shape[1:])
    size = (tensor.stop - tensor.start) // max(prod(tensor.shape), 1) * prod(shape)
    return RenamedTensor(name, tensor.dtype, shape, tensor.path, 0, size, tensor, rows)


def _zeros(weight: StoredTensor, name: str) -> ZeroTensor:
    """Return a bias of zeros for a projection."""
    size = (weight.stop - weight.start) // weight.shape[1]
    return ZeroTensor(name, weight.dtype, weight.shape[:1], weight.path, 0, size)


@dataclass(frozen=True)
class Origin:
    """What a sparse checkpoint of transformers' own was before it was read as a dense one.

    Attributes:
        model_type: of the sparse one.
        architecture: the class of its head.
        pattern: its own; None where it attends fully.
        layers: those that are dense.
    """

    model_type: str
    architecture: str
    pattern: Pattern | None
    layers: dict[int | str, Pattern | str]


def read_as_dense(name: str, kin: Kin, config: Any) -> tuple[Origin, dict[str, Any]]:
    """Say what a sparse checkpoint is, and what the config.json of its dense kin holds.

    Args:
        name: of the checkpoint.
        kin: of its model type.
        config: its config, whose ``architectures`` may be missing.

    Raises:
        UnsupportedModelError: if the dense type has no such head, or cannot do what the config asks for.
    """
    architectures = config.architectures or [f"{kin.names[0]}Model"]
    found = [kin.dense_class(architecture) for architecture in architectures]
    if None in found:
        raise UnsupportedModelError(
            f"{name} is a {architectures[found.index(None)]}, and a {kin.names[1]} has no head like it; save its base model "
            f"alone ({kin.names[0]}Model.from_pretrained(...).save_pretrained(...)) and convert that"
        )
    for field, value in kin.not_kept.items():
        if getattr(config, field) != value:
            raise UnsupportedModelError(
                f"{name} cannot be read as a {kin.names[1]}: {field} is {getattr(config, field)!r}, only {value!r} can be"
            )
    held = {key: value for key, value in config.to_dict().items() if key not in kin.dropped}
    if kin.dense_type == "bart":
        held["max_position_embeddings"] = config.max_encoder_position_embeddings
    if kin.dense_type == "pegasus":
        # which a Pegasus would else have
        held.setdefault("forced_eos_token_id", None)
    # what a decoder reads of itself is short, and was never sparse
    decoders = range(config.decoder_layers if config.is_encoder_decoder else 0)
    layers: dict[int | str, Pattern | str] = {f"decoder.{i}": "dense" for i in decoders}
    held |= {"model_type": kin.dense_type, "architectures": found}
    return Origin(config.model_type, architectures[0], kin.pattern(config), layers), held


def _bart_rows(tensor: StoredTensor, config: Any) -> tuple[int, ...]:
    """Return the rows of a table of positions as BART has it.

    Two that are never read come first, and both stacks have as many; a decoder's that are missing repeat those it has.
    """
    return (0, 0, *(row % tensor.shape[0] for row in range(config.max_encoder_position_embeddings)))


def _windows(config: Any) -> list[int]:
    held = config.attention_window
    return held if isinstance(held, list) else [held]


def _longformer(config: Any) -> Pattern:
    windows = _windows(config)
    return hf_sparse.pattern("longformer", window=windows if len(set(windows)) > 1 else windows[0])


def _bigbird_shortest(config: Any) -> int:
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def _bigbird(config: Any) -> Pattern | None:
    if config.attention_type == "original_full":
        return None
    blocks = {"block_size": config.block_size, "num_random_blocks": config.num_random_blocks}
    return hf_sparse.pattern("bigbird", **blocks, length="padded")


_BLOCKS = ("attention_type", "use_bias", "block_size", "num_random_blocks")
_BIGBIRD: dict[str, Any] = {
    "pattern": _bigbird,
    "shortest": _bigbird_shortest,
    "compared_tokens": lambda config: _bigbird_shortest(config) + 2 * config.block_size,
}
KIN: dict[str, Kin] = {
    "longformer": Kin(
        names=("Longformer", "Roberta"),
        dense_type="roberta",
        heads=(*_HEADS, "ForSequenceClassification", "ForQuestionAnswering"),
        renamings=(
            (r"^longformer\.", "roberta."),
            (r"\.attention\.self\.(query|key|value)_global\.", r".attention.self.sparse_state.\1."),
        ),
        dropped=("attention_window", "onnx_export"),
        pattern=_longformer,
    ),
    "led": Kin(
        names=("LED", "Bart"),
        dense_type="bart",
        heads=("Model", "ForConditionalGeneration", "ForQuestionAnswering"),
        renamings=(
            (r"^led\.", "model."),
            (_LAYER + r"longformer_self_attn\.(query|key|value)_global\.", r"\1sparse_state.\2."),
            (_LAYER + r"longformer_self_attn\.(q|k|v)(uery|ey|alue)\.", r"\1\2_proj."),
            (_LAYER + r"output\.", r"\1out_proj."),
        ),
        dropped=("attention_window", "max_encoder_position_embeddings", "max_decoder_position_embeddings"),
        pattern=_longformer,
    ),
    "big_bird": Kin(
        names=("BigBird", "Bert"),
        dense_type="bert",
        heads=(*_HEADS, "ForPreTraining"),
        renamings=((r"^(bert\.)?pooler\.(weight|bias)$", r"\1pooler.dense.\2"),),
        dropped=(*_BLOCKS, "rescale_embeddings"),
        not_kept={"use_bias": True, "rescale_embeddings": False, "is_decoder": False, "add_cross_attention": False},
        **_BIGBIRD,
    ),
    "bigbird_pegasus": Kin(
        names=("BigBirdPegasus", "Pegasus"),
        dense_type="pegasus",
        heads=("Model", "ForConditionalGeneration"),
        renamings=(
            (r"((?:en|de)coder\.)layernorm_embedding\.", r"\1layer_norm."),
            (_LAYER + r"self\.(q|k|v)(uery|ey|alue)\.", r"\1\2_proj."),
            (_LAYER + r"output\.", r"\1out_proj."),
        ),
        dropped=_BLOCKS,
        keeps_length=True,
        **_BIGBIRD,
    ),
}
