"""Sparse attention for Hugging Face Transformers: importing this package registers it."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_sparse.attention import sparse_attention
from hf_sparse.choice import explain
from hf_sparse.errors import ConversionError, HfSparseError, PushError, UnsupportedModelError
from hf_sparse.integration.adapters import lora_targets
from hf_sparse.integration.auto import register_configs
from hf_sparse.integration.calibrate import calibrate_
from hf_sparse.integration.imitate import imitate_
from hf_sparse.integration.nodes import keep_nodes
from hf_sparse.integration.register import register_attention
from hf_sparse.integration.sentences import sentence_ids
from hf_sparse.integration.sparsify import sparse_config, sparsify_
from hf_sparse.patterns import PATTERNS, Pattern, by_head, pattern, pattern_from_dict

if TYPE_CHECKING:
    from hf_sparse.conversion import ConversionReport, ExportReport, FidelityReport, LayerPlan

__version__ = "0.1.0"

register_attention()
register_configs()


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    pattern: Pattern | None = None,
    *,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    allow_pickle: bool = False,
    remote_code: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> "ConversionReport":
    """Convert a dense checkpoint into a sparse one that the Auto classes load.

    A checkpoint of transformers' own Longformer, LED, BigBird or BigBird-Pegasus, or of LSG, is a source as well: it becomes
    the RoBERTa, BART, BERT or Pegasus that it otherwise is, and with no ``pattern`` it keeps its own, with the weights of its
    global tokens.

    The weights are written tensor by tensor into the folder ``<destination>.partial``, which takes the destination's place at
    the end: whatever is raised, Ctrl-C included, leaves nothing at the destination, and with ``overwrite`` what was there.
    After a kill (SIGTERM or SIGKILL) that folder stays, and the same call goes on with it: weights files that are whole are
    not written again. All faults of the input are found before the first byte is written.

    Args:
        source: a folder with config.json and safetensors weights, or the id of a model on the Hub.
        destination: the folder to write; must not exist or be empty unless ``overwrite``.
        pattern: serves every layer not named in ``layers``; None takes that of a source which is sparse already.
        max_length: tokens of the longest text wanted; tables of positions then become longer, and every limit of length in
            the files beside is raised. None keeps the length.
        image_size: for a model that reads images, in the place of ``max_length``: pixels of the largest image wanted, or
            its (height, width). The positions are then interpolated, and the sizes of the image processor raised.
        positions: how positions reach ``max_length``. A learned table repeats ("tile", None as well), or its rows move apart
            and those between are interpolated ("interpolate"). Rotary positions stay as they are ("none", None as well), which
            suits patterns that read no farther than the source was trained on, or are scaled: "linear", "ntk", "yarn" and
            "dynamic". What moves or scales positions waits for some training.
        layers: maps a layer ("3" or a number; "encoder.3" or "decoder.3" where there are both) to a pattern or to "dense".
        calibrate: a plain text in UTF-8, read as one text whatever its lines are and cut into pieces as long as the
            destination's longest text; of a long one the first 32,768 tokens. Where the pattern is ``routing`` its
            centroids are moved to where the source's queries and keys are on it, by five steps of ``calibrate_``, and
            saved with the weights. None leaves them at random directions.
        overwrite: whether a destination that is not empty is replaced, all of it.
        verify: whether the result, its patterns wide open, is compared with the source; a source that is sparse already is
            compared with the pattern as it is. Both are loaded in float32, one after
            the other, and the report says what that held in memory; writing holds less than two of the largest weights file.
        allow_pickle: whether weights that are there only as ``pytorch_model.bin`` are read. Nothing but tensors is unpickled;
            the destination has safetensors.
        remote_code: whether a few lines of code come along, with which ``trust_remote_code=True`` loads the checkpoint where
            hf_sparse is installed and not imported.
        push_to: id of a model on the Hub ("user/name") that the destination is pushed to in the end, with a card and a
            picture of the pattern. The same call pushes anew what could not be pushed.
        private: whether a new model there is for its owner alone; None takes the Hub's default.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes the one that was logged in with.
        progress: called with the bytes written and the bytes in all; None draws a bar in a terminal once the work has
            taken over two seconds.

    Returns:
        What was moved, tiled, added and left behind, the density, and the largest difference from the source.

    Raises:
        ConversionError: if the source cannot be read, the destination cannot be written or the two do not agree; if the
            text to calibrate on is missing, empty or not UTF-8, or there is nothing to calibrate.
        PushError: if the destination, which is whole, could not be pushed.
        UnsupportedModelError: if the model type cannot be converted; says why.
        ValueError: if the pattern, a layer, ``max_length``, ``image_size`` or ``positions`` does not fit the checkpoint.
    """
    from hf_sparse.conversion import convert as run

    return run(
        source,
        destination,
        pattern,
        max_length=max_length,
        image_size=image_size,
        positions=positions,
        layers=layers,
        calibrate=calibrate,
        overwrite=overwrite,
        verify=verify,
        allow_pickle=allow_pickle,
        remote_code=remote_code,
        push_to=push_to,
        private=private,
        revision=revision,
        token=token,
        progress=progress,
    )


def export(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "ExportReport":
    """Write a sparse checkpoint as a Longformer, LED or BigBird of transformers' own, which runs without this package.

    What a pattern says and such a class cannot is refused. The whole model is held in memory, twice. Files beside the weights
    come along, but for the README.

    Args:
        source: a folder with a sparse checkpoint, or its id on the Hub.
        destination: the folder to write; must not exist or be empty unless ``overwrite``.
        to: "longformer" (from BERT, RoBERTa, XLM-RoBERTa and CamemBERT; patterns ``longformer`` without dilation, and
            ``band``), "led" (from BART with a dense decoder; the same patterns) or "bigbird" (from the same as "longformer";
            pattern ``bigbird``).
        overwrite: whether a destination that is not empty is replaced, all of it.
        verify: whether the two are compared on random texts.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes the one that was logged in with.

    Returns:
        The class, where it does something else than the source, and the largest difference between the two.

    Raises:
        ConversionError: if the source cannot be read or is dense, the destination cannot be written or the two do not agree.
        UnsupportedModelError: if the class cannot do what the source does; says what.
        ValueError: if ``to`` is none of the three.
    """
    from hf_sparse.conversion import export as run

    return run(source, destination, to, overwrite=overwrite, verify=verify, revision=revision, token=token)


def plan_layers(
    source: str | os.PathLike[str],
    texts: str | os.PathLike[str],
    density: float,
    *,
    length: int | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "LayerPlan":
    """Choose for each layer of a dense checkpoint the pattern that keeps the most of its attention, within a budget.

    Each layer has position-based patterns of several densities to choose from, and may stay dense. The choice is the best there
    is: no other one keeps a larger share of attention on these texts, mean over layers, at a mean density within the budget.
    Shares and densities are those at ``length``: a window that reads a tenth of 512 tokens reads an eightieth of 4,096.

    Args:
        source: a folder with config.json and safetensors weights, or the id of a model on the Hub.
        texts: a plain text in UTF-8, or a .jsonl whose lines have a "text". Pieces of the texts, one of each, then a second of
            each and so on, 16 at the most, are cut; every other one is chosen on, and the rest are left to judge the plan on.
        density: pairs of tokens that are read, over all pairs (so that a dense causal layer reads half), mean over layers, at
            the most; above 0, at most 1.
        length: tokens of a piece; None takes what the checkpoint reads, 2,048 at the most.
        max_length: tokens of the longest text that the plan is to serve: a sliding window of the model's own has to hold what
            is read there. None takes what the checkpoint reads.
        allow_pickle: whether ``pytorch_model.bin`` is read where there is no safetensors; nothing but tensors is unpickled.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes the one that was logged in with.

    Returns:
        The plan, the same for the same arguments: ``convert(source, destination, plan.pattern, layers=plan.layers)``.

    Raises:
        ConversionError: if the source or the texts cannot be read.
        UnsupportedModelError: if the model type cannot be converted; says why.
        ValueError: if no text is as long as a piece, or nothing is as sparse as the budget.
    """
    from hf_sparse.conversion import plan_layers as run

    return run(
        source,
        texts,
        density,
        length=length,
        max_length=max_length,
        allow_pickle=allow_pickle,
        revision=revision,
        token=token,
    )


def inspect_fidelity(
    source: str | os.PathLike[str],
    patterns: "Sequence[Pattern | LayerPlan]",
    texts: str | os.PathLike[str],
    *,
    length: int | None = None,
    max_length: int | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
    converted: str | os.PathLike[str] | None = None,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> "FidelityReport":
    """Say how near sparse models stay to the dense checkpoint they come from, and what they cost; nothing is written.

    Args:
        source: a folder with config.json and safetensors weights, or the id of a model on the Hub.
        patterns: patterns, and plans by layer. Where there is a plan, what it was chosen on is left out.
        texts: as for ``plan_layers``.
        length: tokens of a piece, within which models are compared; None takes what the checkpoint reads, 2,048 at the most.
        max_length: tokens of the longest text: positions are made as long as ``convert`` does. None takes twice, four times or
            eight times what the checkpoint reads, as far as a text is as long.
        positions: how rotary positions reach longer texts; as for ``convert``.
        layers: maps layers to patterns or to "dense", for what is no plan; as for ``convert``.
        converted: a folder that ``convert`` made with the only one of ``patterns``, whose weights are read; None takes those of
            the source.
        allow_pickle: whether ``pytorch_model.bin`` is read where there is no safetensors; nothing but tensors is unpickled.
        revision: branch, tag or commit on the Hub.
        token: for the Hub; None takes the one that was logged in with.

    Returns:
        Kept attention by layer and head, divergence and cosine against the dense model, losses, density, operations, memory,
        and the length from which on sparse attention is faster.

    Raises:
        ConversionError: if the source or the texts cannot be read.
        UnsupportedModelError: if the model type cannot be converted; says why.
        ValueError: if no text is as long as a piece, or a pattern does not fit the checkpoint.
    """
    from hf_sparse.conversion import inspect_fidelity as run

    return run(
        source,
        patterns,
        texts,
        length=length,
        max_length=max_length,
        positions=positions,
        layers=layers,
        converted=converted,
        allow_pickle=allow_pickle,
        revision=revision,
        token=token,
    )


def __getattr__(name: str) -> Any:
    # classes of the conversion, which is imported when they are first asked for
    if name in ("ConversionReport", "ExportReport", "FidelityReport", "LayerPlan"):
        from hf_sparse import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PATTERNS",
    "ConversionError",
    "ConversionReport",
    "ExportReport",
    "FidelityReport",
    "HfSparseError",
    "LayerPlan",
    "PushError",
    "UnsupportedModelError",
    "by_head",
    "calibrate_",
    "convert",
    "explain",
    "export",
    "imitate_",
    "inspect_fidelity",
    "keep_nodes",
    "lora_targets",
    "pattern",
    "pattern_from_dict",
    "plan_layers",
    "sentence_ids",
    "sparse_attention",
    "sparse_config",
    "sparsify_",
]
