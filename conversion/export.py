"""Export: a sparse checkpoint as a Longformer, LED or BigBird of transformers' own, which runs without this package."""

import contextlib
import copy
import dataclasses
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_sparse.conversion.companions import is_foreign
from hf_sparse.conversion.destination import check_destination, check_free, check_space
from hf_sparse.conversion.in_tree import KIN, Kin
from hf_sparse.conversion.source import files_of, locate
from hf_sparse.conversion.verify import quietly
from hf_sparse.conversion.verify_in_tree import in_tree_difference
from hf_sparse.errors import ConversionError, UnfinishedConversionError, UnsupportedModelError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.card import PICTURE
from hf_sparse.integration.families import family_of
from hf_sparse.integration.layers import self_attention_modules, tag_of
from hf_sparse.integration.positions import METHOD_FIELD
from hf_sparse.integration.remote_code import MODULE
from hf_sparse.patterns import Band, BigBird, Longformer, Pattern

TYPES = {"longformer": "longformer", "led": "led", "bigbird": "big_bird"}
# what a sparse checkpoint says of itself, and brings to be loaded by
_OURS = ("config.json", "README.md", PICTURE, f"{MODULE}.py")
# lengths for which the in-tree BigBird draws its random blocks from a plan for as many tokens as it reads at most
_PLANNED_FOR = 4096
# how the names of the classes of dense types begin
_NAMES = {"bart": "Bart", "bert": "Bert", "camembert": "Camembert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
_ROBERTAS = ("camembert", "roberta", "xlm-roberta")
# the names of weights of another dense type than the one a sparse type is read as: what stands in those, and in its own
_FROM_ROBERTA = (
    (r"^roberta\.", "bert."),
    (r"^lm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"^lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^lm_head\.", "cls.predictions."),
    # what a BERT calls its pooler is the first half of a RoBERTa's head
    (r"^classifier\.dense\.", "bert.pooler.dense."),
    (r"^classifier\.out_proj\.", "classifier."),
)
_FROM_BERT = (
    (r"^bert\.", "roberta."),
    (r"^cls\.predictions\.transform\.dense\.", "lm_head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "lm_head.layer_norm."),
    (r"^cls\.predictions\.", "lm_head."),
)
# what a sparse type is made from: model types, how weights are named there, and the heads that fit
_SOURCES: dict[tuple[str, str], tuple[tuple[tuple[str, str], ...], tuple[str, ...]]] = {
    **{("longformer", one): ((), KIN["longformer"].heads) for one in _ROBERTAS},
    ("longformer", "bert"): (_FROM_ROBERTA, KIN["longformer"].heads),
    ("led", "bart"): ((), KIN["led"].heads),
    ("big_bird", "bert"): ((), KIN["big_bird"].heads),
    **{
        ("big_bird", one): (_FROM_BERT, ("Model", "ForMaskedLM", "ForTokenClassification", "ForMultipleChoice"))
        for one in _ROBERTAS
    },
}


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        source: the sparse checkpoint; of the Hub's, with the commit.
        destination: the folder that was written.
        architecture: the class of transformers that loads it.
        max_length: tokens of the longest text.
        notes: where the class does something else than the source, in words.
        difference: the largest absolute difference between outputs of the two; None where they were not compared.
        compared: what was compared, or why not.
        seconds: how long it took.
    """

    source: str
    destination: str
    architecture: str
    max_length: int
    notes: tuple[str, ...]
    difference: float | None
    compared: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

    def table(self) -> Table:
        """Return the report as a table for ``rich`` to print."""
        table = Table(show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        difference = "" if self.difference is None else f"largest difference {self.difference:.1e}: "
        for name, value in (
            ("source", self.source),
            ("destination", self.destination),
            ("loads as", self.architecture),
            ("longest input", f"{self.max_length:,} tokens"),
            *(("note", note) for note in self.notes),
            ("compared", f"{difference}{self.compared}"),
            ("seconds", f"{self.seconds:.1f}"),
        ):
            table.add_row(name, value)
        return table


def export(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ExportReport:
    """Write a sparse checkpoint as one of transformers' own; see :func:`hf_sparse.export`."""
    started = time.monotonic()
    if to not in TYPES:
        raise ValueError(f"to must be one of {', '.join(TYPES)}; got {to!r}")
    kin = KIN[TYPES[to]]
    root, name, _, _ = locate(source, revision, token, allow_pickle=False)
    wanted = check_destination(destination, source=root)
    check_free(wanted, overwrite=overwrite)
    config = _read_sparse(root, name)
    dense_name = (config.architectures or ["Sparse"])[0].removeprefix("Sparse")
    head = _head(kin, TYPES[to], config, dense_name, name)
    cls: Any = sparse_model_class(getattr(transformers, dense_name))
    with quietly(), torch.random.fork_rng(devices=[]):
        model = cls.from_pretrained(root, config=copy.deepcopy(config), dtype="auto")
    fields, notes = _bigbird_fields(model) if to == "bigbird" else _window_fields(model, head, to)
    made_class: Any = getattr(transformers, f"{kin.names[0]}{head}")
    with quietly(), torch.random.fork_rng(devices=[]):
        made = made_class(_config(model.config, kin, fields)).to(model.dtype)
        made.load_state_dict(_weights(model, made, kin, TYPES[to]))
        if made.can_generate() and model.generation_config is not None:
            # what config.json alone may say
            made.generation_config = model.generation_config
    check_space(wanted, sum(weight.nbytes for weight in made.state_dict().values()))
    with _beside(wanted) as folder:
        with quietly():
            made.save_pretrained(folder)
        for path in files_of(root):
            # what lies in folders of its own is of other modules, as sentence-transformers has them
            is_ours = path.parent == PurePosixPath() and path.name in _OURS
            if not is_ours and not is_foreign(path, PurePosixPath()):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / path, folder / path)
        difference, compared = None, "not compared: verify was off"
        if verify:
            pattern = next(pattern for pattern in _patterns(model) if pattern is not None)
            difference, compared = in_tree_difference((made_class, folder), (cls, root, config), pattern)
        _put_in_place(folder, wanted, overwrite=overwrite)
    length = family_of(config).length(config)
    seconds = time.monotonic() - started
    return ExportReport(name, str(destination), made_class.__name__, length, notes, difference, compared, seconds)


def _read_sparse(root: Path, name: str) -> Any:
    if not (root / "config.json").is_file():
        raise ConversionError(f"{name} is not a checkpoint: {root} holds no config.json; pass the folder that holds it")
    if (root / "adapter_config.json").is_file():
        raise ConversionError(
            f"{name} holds an adapter (adapter_config.json), which an export would leave out; merge it into its model and save "
            "that, or remove it"
        )
    try:
        config = AutoConfig.from_pretrained(root)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{name} cannot be read: {error}") from error
    if getattr(config, "sparse_attention", None) is None:
        raise ConversionError(
            f"{name} is a dense {config.model_type}, and only sparse checkpoints are exported; convert it first"
        )
    return config


def _head(kin: Kin, model_type: str, config: Any, dense_name: str, name: str) -> str:
    """Return how the name of the class ends that a checkpoint is to be loaded by.

    Raises:
        UnsupportedModelError: if there is none that computes the same.
    """
    dense_type = config.dense_model_type
    known = [own for target, own in _SOURCES if target == model_type]
    if dense_type not in known:
        raise UnsupportedModelError(f"{name} is a {dense_type}; a {kin.names[0]} can be made from {', '.join(known)}")
    names, heads = _SOURCES[model_type, dense_type]
    head = dense_name.removeprefix(_NAMES[dense_type])
    if head not in heads:
        raise UnsupportedModelError(
            f"{name} is a Sparse{dense_name}, and a {kin.names[0]} has no such head; it has {', '.join(heads)}"
        )
    refused = {
        "its embeddings are scaled (scale_embedding)": getattr(config, "scale_embedding", False),
        "it is a decoder (is_decoder)": config.is_decoder,
        "positions are counted from pad_token_id, and it has none": (
            model_type == "longformer" and not isinstance(config.pad_token_id, int)
        ),
        "one of the two heads computes gelu, the other what hidden_act says": bool(names)
        and head == "ForMaskedLM"
        and config.hidden_act != "gelu",
    }
    for reason, is_so in refused.items():
        if is_so:
            raise UnsupportedModelError(f"{name} cannot be a {kin.names[0]}: {reason}")
    return head


def _patterns(model: Any) -> list[Pattern | None]:
    """Return the pattern of each layer of a model, of an encoder-decoder of the encoder alone.

    Raises:
        UnsupportedModelError: if its decoder is sparse.
    """
    tags = [tag_of(module) for _, _, _, module in self_attention_modules(model)]
    if any(tag is not None and tag.stack == "decoder" and tag.pattern is not None for tag in tags):
        raise UnsupportedModelError(
            "its decoder is sparse, and an LED's is dense; convert the dense checkpoint again with each layer of the decoder "
            "dense (--layer decoder.0=dense and so on)"
        )
    return [tag.pattern for tag in tags if tag is not None and tag.stack != "decoder"]


def _window_fields(model: Any, head: str, to: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what a Longformer's or LED's config says of the pattern, and where the class does something else.

    Raises:
        UnsupportedModelError: if it cannot say it.
    """
    marks = to == "longformer" and head in ("ForSequenceClassification", "ForQuestionAnswering", "ForMultipleChoice")
    windows = []
    for index, pattern in enumerate(_patterns(model)):
        if isinstance(pattern, Longformer) and pattern.dilation == 1:
            is_own = marks and pattern.global_tokens == (0,) and head == "ForSequenceClassification"
            if pattern.global_tokens and not is_own:
                raise UnsupportedModelError(
                    f"its pattern names global tokens {list(pattern.global_tokens)}, which the in-tree class takes from each "
                    "call alone; convert with global_tokens=[] and mark them by global_attention_mask"
                )
            windows.append(pattern.window[index] if isinstance(pattern.window, tuple) else pattern.window)
        elif isinstance(pattern, Band) and pattern.radius and not marks:
            windows.append(2 * pattern.radius)
        elif isinstance(pattern, Band) and pattern.radius:
            raise UnsupportedModelError(f"a band has no global tokens, and Longformer{head} marks some by itself")
        else:
            said = "is dense" if pattern is None else f"has the pattern {pattern.json}"
            raise UnsupportedModelError(
                f"layer {index} {said}; a {KIN[to].names[0]} has a window on every layer (band, or longformer without dilation)"
            )
    notes: tuple[str, ...] = ()
    if head == "ForMultipleChoice" or (to == "led" and head == "ForQuestionAnswering"):
        notes = ("where a call marks no global tokens, the class marks others than the source",)
    return {"attention_window": windows}, notes


def _bigbird_fields(model: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what a BigBird's config says of the pattern, and where the class does something else.

    Raises:
        UnsupportedModelError: if it cannot say it.
    """
    held = _patterns(model)
    pattern = held[0]
    if not isinstance(pattern, BigBird) or any(other != pattern for other in held):
        raise UnsupportedModelError("a BigBird has the pattern bigbird, and the same one on every layer")
    reads_random = pattern.num_random_blocks > 0 and pattern.random_plan != "evaluation"
    length = family_of(model.config).length(model.config)
    refused = {
        "its pattern has external nodes": pattern.num_external_global > 0,
        "its random blocks are drawn over the full length": reads_random and pattern.random_plan == "full_length",
        f"its random blocks are drawn with seed {pattern.seed}, those of a BigBird with 0": reads_random
        and pattern.seed != 0,
        f"the in-tree class draws other random blocks where it reads {length:,} tokens at most; it draws the same with "
        f"{_PLANNED_FOR:,}, or fewer than 1,024": reads_random and length not in range(1024) and length != _PLANNED_FOR,
    }
    for reason, is_so in refused.items():
        if is_so:
            raise UnsupportedModelError(f"it cannot be a BigBird: {reason}")
    shortest = KIN["big_bird"].shortest(pattern)
    notes = [f"up to {shortest:,} tokens the class attends fully, and once it has, it goes on to"]
    if reads_random:
        notes.append("in evaluation the class reads the first block again in the place of each random one")
    elif pattern.random_plan == "evaluation":
        notes.append("in training the class reads random blocks")
    if pattern.length == "real":
        notes.append(
            "the class lays its blocks over the padded length: what it says of a text depends on the padding beside it"
        )
    blocks = {"block_size": pattern.block_size, "num_random_blocks": pattern.num_random_blocks}
    return {**blocks, "attention_type": "block_sparse"}, tuple(notes)


def _config(config: Any, kin: Kin, fields: dict[str, Any]) -> Any:
    """Return the config of a sparse type of transformers' own that says what a sparse config of ours does."""
    model_type = next(name for name, one in KIN.items() if one is kin)
    ours = ("model_type", "architectures", "sparse_attention", "auto_map", "transformers_version", METHOD_FIELD)
    held = {key: value for key, value in config.to_dict().items() if key not in ours}
    length = family_of(config).length(config)
    # the class pads texts to whole windows or blocks, and reads positions of that padding
    step = max(fields["attention_window"]) if "attention_window" in fields else fields["block_size"]
    rows = -(-length // step) * step if model_type != "longformer" else length + config.pad_token_id + 1
    if model_type == "led":
        held.pop("max_position_embeddings")
        held |= {"max_encoder_position_embeddings": rows, "max_decoder_position_embeddings": length}
    else:
        held["max_position_embeddings"] = rows
    made: Any = CONFIG_MAPPING[model_type](**{**held, **fields})
    return made


def _weights(model: Any, made: Any, kin: Kin, model_type: str) -> dict[str, Tensor]:
    """Return the weights of a model under the names and in the shapes of the class that is to have them."""
    family: Any = family_of(model.config)
    names = _SOURCES[model_type, model.config.dense_model_type][0]
    held, weights = model.state_dict(), {}
    for name, wanted in made.state_dict().items():
        own = kin.dense_name(name)
        for old, new in names:
            own = re.sub(old, new, own)
        if own not in held:
            # rows of global tokens that have no projections of their own use the layer's
            own = re.sub(r"\.sparse_state\.(query|key|value)\.", r".\1.", own)
            own = re.sub(r"\.sparse_state\.(q|k|v)(uery|ey|alue)\.", r".\1_proj.", own) if own not in held else own
        if own not in held and "pooler." in own:
            # a BigBird has one under every head, which most do not read
            weights[name] = torch.zeros_like(wanted)
            continue
        weight = held[own]
        if own.endswith(family.positions):
            rows = weight[family.offset(model.config) :]
            before = len(wanted) - len(rows) if model_type == "longformer" else 0
            # rows in front stand for padding, those behind are beyond the longest text
            weight = torch.cat([rows[:1].expand(before, -1), rows, rows])[: len(wanted)]
        weights[name] = weight
    return weights


@contextlib.contextmanager
def _beside(wanted: Path) -> Iterator[Path]:
    """Yield a folder beside the destination, which is gone at the end unless it took the destination's place."""
    folder = wanted.with_name(f"{wanted.name}.partial")
    for way in (folder, _aside(wanted)):
        if way.exists():
            raise ConversionError(f"{way} is in the way; remove it, or choose another destination")
    folder.mkdir()
    try:
        yield folder
    except SafetensorError as error:
        raise UnfinishedConversionError(
            f"the weights could not be written, and nothing was left at {wanted}: {error}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _aside(wanted: Path) -> Path:
    """Return where what is replaced stands for a moment."""
    return wanted.with_name(f"{wanted.name}.replaced")


def _put_in_place(folder: Path, wanted: Path, *, overwrite: bool) -> None:
    if not overwrite or not wanted.exists():
        try:
            # takes the place of an empty folder, and of no other
            os.rename(folder, wanted)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UnfinishedConversionError(
                    f"destination {wanted} was filled by someone else meanwhile; choose another"
                ) from error
            raise
        return
    aside = _aside(wanted)
    try:
        os.rename(wanted, aside)
        os.rename(folder, wanted)
    except BaseException:
        if aside.exists() and not wanted.exists():
            os.rename(aside, wanted)
        raise
    shutil.rmtree(aside, ignore_errors=True)
