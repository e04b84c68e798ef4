"""Does the destination, with its pattern wide open, say what the source says?"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from hf_sparse.conversion.target import Target
from hf_sparse.errors import UnfinishedConversionError, UnsupportedModelError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.entry import Entry
from hf_sparse.integration.families import FAMILIES
from hf_sparse.integration.positions import METHOD_FIELD, lengthen_

# larger differences, against the largest output, are no rounding of float32
_TOLERANCE = 1e-3
_MOST_TOKENS = 512
# a model reads no smaller images than it is for, so larger ones are not compared: dense attention would take minutes
_MOST_PATCHES = 4500
# stands for padding where a checkpoint has none
_PADDING = 0


def compared(compare: Callable[[], tuple[float | None, str]], *, wanted: bool) -> dict[str, Any]:
    """Return what is reported of a comparison, by field of the report.

    Args:
        compare: returns the largest absolute difference, or None, and what was done, in words.
        wanted: whether to compare at all.
    """
    if not wanted:
        said = {"wide_open_difference": None, "wide_open_note": "not compared: verify was off"}
        return {**said, "wide_open_bytes": None}
    before = _held_bytes("VmRSS")
    difference, note = compare()
    peak = _held_bytes("VmHWM")
    held = None if difference is None or before is None or peak is None else max(peak - before, 0)
    return {"wide_open_difference": difference, "wide_open_note": note, "wide_open_bytes": held}


def _held_bytes(field: str) -> int | None:
    """Return how much memory this process holds (VmRSS) or held at most so far (VmHWM); None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def wide_open_difference(source: Path, destination: Path, target: Target) -> tuple[float | None, str]:
    """Compare the source with the destination, whose patterns are opened wide for it.

    A batch of two random texts, one of them padded, is read by both in float32; or one of two random images, of the
    destination's size, to which the source interpolates its positions by itself.

    Args:
        source: folder of the dense checkpoint.
        destination: folder of the sparse one.
        target: what was converted.

    Returns:
        The largest absolute difference, or None where a pattern cannot be wide open; and what was done, in words.

    Raises:
        UnfinishedConversionError: if the two differ by more than rounding.
        UnsupportedModelError: if the source cannot read texts as long as its config says.
    """
    size = target.image_size
    if size is not None and target.length > _MOST_PATCHES:
        return None, f"not compared: {target.length:,} tokens an image are too many for the dense source"
    is_text = target.dense_class.main_input_name == "input_ids"
    tokens = _compared_tokens(target) if is_text else target.length
    try:
        opened = Entry(
            target.entry.pattern.wide_open(tokens),
            tuple((key, pattern and pattern.wide_open(tokens)) for key, pattern in target.entry.layers),
        )
    except ValueError as error:
        return None, f"not comparable: {error}"
    if opened.pattern.has_nodes and opened.pattern.mask(2)[:, :2, 2:].any():
        return (
            None,
            f"not comparable: tokens read the nodes of pattern {opened.pattern.key!r}, which the source has not",
        )
    dense_config, config = copy.deepcopy(target.dense_config), copy.deepcopy(target.config)
    config.sparse_attention = opened.to_dict()
    if size is None and getattr(dense_config, "pad_token_id", None) is None:
        # a head that classifies a batch of texts asks where each ends
        dense_config.pad_token_id = config.pad_token_id = _PADDING
    if hasattr(config, "rope_parameters"):
        # scaled rotary positions say something else of short texts too: the source is read with the same ones
        dense_config.rope_parameters = copy.deepcopy(config.rope_parameters)
    inputs = _inputs(target, tokens)
    marks = _marks_global(target, inputs.get("attention_mask", torch.ones(2, tokens)))
    asks = {} if size is None else _asks_to_interpolate(target)
    with quietly(), torch.random.fork_rng(devices=[]):
        longer = config if hasattr(config, METHOD_FIELD) else None
        try:
            want, is_whole = outputs(target.dense_class, source, dense_config, {**inputs, **asks}, longer)
        except IndexError as error:
            if target.model_type in FAMILIES:
                raise
            raise UnsupportedModelError(
                f"{target.model_type} reads fewer tokens than the {tokens} of its config (max_position_embeddings): where "
                "its positions begin is not in the table of families"
            ) from error
        got, _ = outputs(sparse_model_class(target.dense_class), destination, config, {**inputs, **marks})
    names, largest = largest_difference(want, got, is_whole=is_whole, how="with the pattern wide open")
    kind = "texts of up to" if is_text else "sounds of" if size is None else "images of"
    return largest, f"{' and '.join(names)} on 2 {kind} {tokens} tokens, float32"


def largest_difference(
    want: dict[str, Tensor], got: dict[str, Tensor], *, is_whole: bool, how: str
) -> tuple[list[str], float]:
    """Return the names of what can be compared, and the largest absolute difference in it."""
    # weights that the source lacks are random in both: only what stands before the head can be compared
    names = [name for name in want if name in got and (is_whole or name == "last_hidden_state")]
    largest = 0.0
    for name in names:
        difference = (want[name] - got[name]).abs().max().item()
        scale = want[name].abs().max().item()
        if not difference <= _TOLERANCE * scale:
            raise UnfinishedConversionError(
                f"the converted model differs from its source by {difference:.2e} in {name} (of at most {scale:.2e}) {how}, so "
                "nothing was kept; please report this with the name of the checkpoint"
            )
        largest = max(largest, difference)
    return names, largest


def _compared_tokens(target: Target) -> int:
    """Return how many tokens of text are compared: no more than a sliding window of the source's own shows whole."""
    return max(min(_MOST_TOKENS, target.length_before, *(window - 1 for window in target.windows)), 1)


def _inputs(target: Target, tokens: int) -> dict[str, Tensor]:
    """Return what both models read: two images, two sounds, or two texts of a length."""
    if target.image_size is not None:
        return _images(target, target.image_size)
    texts = random_texts(target.dense_config, tokens)
    if target.dense_class.main_input_name != "input_features":
        return texts
    config: Any = target.dense_config
    generator = torch.Generator().manual_seed(0)
    # a sound has always the same length
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    said = {"decoder_input_ids": texts["input_ids"][:, : config.max_target_positions]}
    return {"input_features": features, **said}


def random_texts(config: Any, tokens: int) -> dict[str, Tensor]:
    """Return two random texts, the second padded for two fifths of its length."""
    generator = torch.Generator().manual_seed(0)
    padding = getattr(config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) else _PADDING
    # any token but the padding one, from which RoBERTa reads where the padding is
    ids = torch.randint(0, max(config.vocab_size - 1, 1), (2, tokens), generator=generator)
    ids = ids + (ids >= padding)
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[1, max(1, 3 * tokens // 5) :] = 0
    ids = torch.where(mask == 0, torch.tensor(padding), ids)
    if getattr(config, "is_encoder_decoder", False):
        # BART classifies what the only end of each text became
        ids[ids == config.eos_token_id] = next(i for i in range(3) if i not in (padding, config.eos_token_id))
        ids[torch.arange(2), mask.sum(1) - 1] = config.eos_token_id
    return {"input_ids": ids.clamp(max=config.vocab_size - 1), "attention_mask": mask}


def _images(target: Target, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return two random images of a height and width."""
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, target.dense_config.num_channels, *size, generator=generator)}


def _asks_to_interpolate(target: Target) -> dict[str, bool]:
    """Return what asks the source to read images of another size; some models always do."""
    known = inspect.signature(target.dense_class.forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}


def _marks_global(target: Target, marks: Tensor) -> dict[str, Tensor]:
    """Mark every token as global where the patterns have such, so that the weights of their rows are compared too.

    A mask replaces the positions that a pattern opened wide names, so it must not mark fewer.
    """
    patterns = [target.entry.pattern, *(pattern for _, pattern in target.entry.layers if pattern is not None)]
    if not all(pattern.has_global_tokens for pattern in patterns):
        return {}
    return {"global_attention_mask": marks}


def outputs(
    cls: Any, folder: Path, config: Any, inputs: dict[str, Any], longer: Any = None, *, is_training: bool = False
) -> tuple[dict[str, Tensor], bool]:
    """Return what a model says, of texts of the real tokens, and whether the checkpoint holds all its weights.

    Positions that were interpolated say something else of short texts too: with ``longer`` those of the source are as well.
    """
    config.use_cache = False
    # a pattern opened wide may have fewer centroids than the checkpoint
    settings = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, found = cls.from_pretrained(folder, config=config, dtype=torch.float32, **settings)
    for name, held, wanted in found["mismatched_keys"]:
        if ".sparse_state." not in name:
            raise UnfinishedConversionError(f"{name} has shape {list(held)} where {list(wanted)} is wanted")
    if longer is not None:
        lengthen_(model, longer)
    model.train(is_training)
    padding = inputs.get("attention_mask")
    if padding is not None and "mc_token_ids" in inspect.signature(cls.forward).parameters:
        # else GPT-2 would choose by what padding became
        inputs = {**inputs, "mc_token_ids": padding.sum(1) - 1}
    if cls.__name__.endswith("ForMultipleChoice"):
        inputs = {name: value[:, None] for name, value in inputs.items()}
    if "decoder_input_ids" in inspect.signature(cls.forward).parameters and "input_ids" in inputs:
        # not every model makes them of its input
        inputs = {**inputs, "decoder_input_ids": inputs["input_ids"], "decoder_attention_mask": padding}
    with torch.no_grad():
        said = model(**inputs, output_hidden_states=True)
    outputs = {name: value for name, value in said.items() if isinstance(value, Tensor) and value.is_floating_point()}
    outputs.setdefault("last_hidden_state", said.get("hidden_states", said.get("decoder_hidden_states"))[-1])
    if padding is not None:
        real = padding != 0
        outputs = {name: value[real] if value.shape[:2] == real.shape else value for name, value in outputs.items()}
    return outputs, not found["missing_keys"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' bars and its notes on weights that are not used from the terminal."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
