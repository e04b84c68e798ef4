"""Converting a dense checkpoint into a sparse one."""

import dataclasses
import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import transformers
from torch import Tensor

import hf_sparse
from hf_sparse.conversion import shards
from hf_sparse.conversion.calibration import calibrated, plan_calibration
from hf_sparse.conversion.companions import Companions, plan_companions
from hf_sparse.conversion.destination import check_destination, check_free, check_space
from hf_sparse.conversion.in_tree import KIN
from hf_sparse.conversion.job import Job, sha256_of
from hf_sparse.conversion.model_card import conversion_card
from hf_sparse.conversion.progress import counting
from hf_sparse.conversion.report import ConversionReport
from hf_sparse.conversion.source import INDEX, Checkpoint, open_checkpoint
from hf_sparse.conversion.target import Target, plan_target
from hf_sparse.conversion.verify import compared, wide_open_difference
from hf_sparse.conversion.verify_in_tree import in_tree_difference
from hf_sparse.conversion.weights import PlannedWeights, plan_weights
from hf_sparse.errors import ConversionError, PushError
from hf_sparse.integration.auto import sparse_model_class
from hf_sparse.integration.card import Card, draw
from hf_sparse.integration.entry import Entry, make_entry
from hf_sparse.integration.hub import check_account, push_folder
from hf_sparse.integration.positions import METHOD_FIELD
from hf_sparse.integration.remote_code import auto_map_of, write_code
from hf_sparse.patterns import BigBird, Pattern

_README = "README.md"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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
    judge: Callable[[Path], str] | None = None,
) -> ConversionReport:
    """Convert a dense checkpoint into a sparse one; see :func:`hf_sparse.convert`.

    ``judge`` is given the destination and says in Markdown, for the card, how near it stays to the source.
    """
    started = time.monotonic()
    _check_push(push_to, private, token)
    checkpoint = open_checkpoint(source, revision=revision, token=token, allow_pickle=allow_pickle)
    wanted = check_destination(destination, source=checkpoint.root)
    sizes: dict[str, Any] = {"max_length": max_length, "image_size": image_size, "positions": positions}
    pattern, layers = _own_or(checkpoint, pattern, layers)
    target = plan_target(checkpoint, pattern, layers=layers, **sizes)
    _check_length(checkpoint, target)
    job = Job(wanted, {**_arguments(checkpoint, target, calibrate), **sizes, "remote_code": remote_code})
    job.find()
    if not job.is_in_place:
        check_free(wanted, overwrite=overwrite)
    calibration = None if calibrate is None else plan_calibration(calibrate, checkpoint, target)
    centroids: dict[str, Tensor] = {}
    weights = plan_weights(checkpoint, target, None if calibration is None else centroids)
    companions = plan_companions(checkpoint, target, raises_limits=(max_length, image_size) != (None, None))
    size = sum(shard.size for shard in weights.shards) + companions.size
    readme = _readme(checkpoint)
    density = target.density(target.length)
    card = conversion_card(
        checkpoint, target, density=density, is_calibrated=calibration is not None, loads_by_code=remote_code
    )
    if job.result is None:
        check_space(wanted, size - job.held_bytes)
        if calibration is not None:
            # before anything is written, and after all that can be refused
            centroids.update(calibrated(checkpoint, target, calibration))
    with job.under_way():
        resumed = tuple(job.done)
        if job.result is None:
            with counting(size, progress) as count:
                _write(job, checkpoint, target, weights, companions, count, loads_by_code=remote_code)
            (job.files / _README).write_text(card.text(readme), encoding="utf-8")
            made = job.files / checkpoint.inner
            job.finish(compared(functools.partial(_difference, checkpoint, made, target), wanted=verify))
        job.put_in_place(overwrite=overwrite)
        pushed = None
        if judge is not None:
            card = dataclasses.replace(card, fidelity=judge(wanted))
        if push_to is not None:
            card = _dressed(wanted, card, target, push_to)
        if judge is not None or push_to is not None:
            (wanted / _README).write_text(card.text(readme), encoding="utf-8")
        if push_to is not None:
            pushed = _push(wanted, checkpoint, push_to, private, token)
    entry = target.entry.to_dict()
    return ConversionReport(
        source=checkpoint.name,
        destination=str(destination),
        model_type=target.config.model_type,
        pattern=entry["pattern"],
        layers=entry["layers"],
        max_length_before=target.length_before,
        max_length=target.length,
        image_size_before=target.image_size_before,
        image_size=target.image_size,
        positions=positions,
        moved=weights.moved,
        tiled=weights.tiled,
        added=weights.added,
        dropped=weights.dropped,
        files_carried=tuple(map(str, companions.carried)),
        files_raised=tuple(sorted(map(str, companions.rewritten))),
        files_left_behind=companions.left_behind,
        files_resumed=resumed,
        density=density,
        **(job.result or {}),
        checksums=_checksums(wanted, job.done),
        rotary=target.rotary,
        calibration=None if calibration is None else calibration.note,
        pushed_to=pushed,
        imported_from=None if checkpoint.origin is None else checkpoint.origin.architecture,
        seconds=time.monotonic() - started,
    )


def _check_push(push_to: str | None, private: bool | None, token: str | bool | None) -> None:
    """Check what can be checked of a push before anything is done."""
    if push_to is None:
        if private is not None:
            raise ValueError(
                "private is for what is pushed, and nothing is; pass push_to (--push-to) as well, or leave it out"
            )
        return
    if not _REPOSITORY.fullmatch(push_to):
        raise ValueError(f"push_to must be the id of a model on the Hub, such as 'user/name'; got {push_to!r}")
    check_account(token)


def _own_or(
    checkpoint: Checkpoint, pattern: Pattern | None, layers: Mapping[int | str, Pattern | str] | None
) -> tuple[Pattern, Mapping[int | str, Pattern | str] | None]:
    """Return the pattern and the layers that were asked for, or a sparse source's own."""
    if pattern is not None:
        return pattern, layers
    origin = checkpoint.origin
    if origin is None:
        raise ValueError(f"{checkpoint.name} is dense, so a pattern is needed; pass one (--pattern)")
    if origin.pattern is None:
        raise ValueError(
            f"{checkpoint.name} is a {origin.model_type} that attends fully, so a pattern is needed; pass one (--pattern)"
        )
    return origin.pattern, {**origin.layers, **(layers or {})}


def _difference(checkpoint: Checkpoint, destination: Path, target: Target) -> tuple[float | None, str]:
    """Return the largest difference between what source and destination say, or None, and what was compared, in words."""
    origin, pattern = checkpoint.origin, target.entry.pattern
    if origin is None:
        return wide_open_difference(checkpoint.folder, destination, target)
    if origin.model_type not in KIN:
        return None, f"not compared: the code of {origin.model_type} does not run"
    same = pattern
    if isinstance(pattern, BigBird) and pattern.random_plan == "evaluation":
        # what the source computes in the other of its modes
        same = dataclasses.replace(pattern, random_plan="published")
    if Entry(same, target.entry.layers) != (origin.pattern and make_entry(origin.pattern, origin.layers)):
        return None, f"not compared: the pattern is not that of the {origin.model_type} that it was"
    if getattr(target.config, METHOD_FIELD, None):
        return None, "not compared: positions moved apart"
    theirs: Any = getattr(transformers, origin.architecture)
    ours = (sparse_model_class(target.dense_class), destination, target.config)
    return in_tree_difference((theirs, checkpoint.folder), ours, pattern)


def _check_length(checkpoint: Checkpoint, target: Target) -> None:
    """Refuse to lengthen positions that the dense type would make anew."""
    origin = checkpoint.origin
    keeps = origin is not None and origin.model_type in KIN and KIN[origin.model_type].keeps_length
    if origin is not None and keeps and target.length > target.length_before:
        raise ValueError(
            f"{checkpoint.name} reads {target.length_before:,} tokens, and the learned positions of a {origin.model_type} "
            f"cannot be lengthened, got {target.length:,}; leave max_length out"
        )


def _arguments(checkpoint: Checkpoint, target: Target, calibrate: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return what decides, beside the sizes, what is written: a conversion that was killed is gone on with by the same."""
    entry = target.entry.to_dict()
    weights = sorted(shard.path for shard in checkpoint.shards)
    return {
        "hf_sparse": hf_sparse.__version__,
        "source": checkpoint.name if checkpoint.is_from_hub else str(checkpoint.root),
        "weights": [_stamp(path) for path in weights],
        "pattern": entry["pattern"],
        "layers": entry["layers"],
        "calibrate": None if calibrate is None else _stamp(Path(calibrate)),
    }


def _stamp(path: Path) -> list[Any]:
    """Return what tells a file from another one, or from itself after a change."""
    if not path.exists():
        return [str(path)]
    return [str(path), path.stat().st_size, path.stat().st_mtime_ns]


def _write(
    job: Job,
    checkpoint: Checkpoint,
    target: Target,
    weights: PlannedWeights,
    companions: Companions,
    count: Callable[[int], None],
    *,
    loads_by_code: bool,
) -> None:
    """Write everything the destination holds but for the README; weights files that are whole stay."""
    folder, inner = job.files, job.files / checkpoint.inner
    inner.mkdir(parents=True, exist_ok=True)
    for shard in weights.shards:
        path = (PurePosixPath(checkpoint.inner) / shard.name).as_posix()
        if path in job.done:
            count(shard.size)
        else:
            job.note(path, shards.write_shard(folder / path, shard.pieces, shard.metadata, count))
    if weights.index is not None:
        _write_json(inner / INDEX, weights.index)
    config = target.config_json(checkpoint.config, companions.separator)
    if loads_by_code:
        config["auto_map"] = auto_map_of(type(target.config))
        write_code(inner, type(target.config))
    _write_json(inner / "config.json", config)
    for companion in companions.carried:
        place = folder / companion
        place.parent.mkdir(parents=True, exist_ok=True)
        if companion not in companions.rewritten:
            shutil.copyfile(checkpoint.root / companion, place)
        count((checkpoint.root / companion).stat().st_size)
    for companion, text in companions.rewritten.items():
        (folder / companion).write_text(text, encoding="utf-8")


def _readme(checkpoint: Checkpoint) -> str | None:
    """Return the source's README, None where there is none."""
    path = checkpoint.root / _README
    try:
        # some editors begin files with a mark
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path} is not UTF-8 text: {error}; save it as UTF-8") from error


def _checksums(folder: Path, known: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of every file of the destination, by path; those that are known are not read again."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {path: known.get(path) or sha256_of(folder / path) for path in paths}


def _dressed(folder: Path, card: Card, target: Target, push_to: str) -> Card:
    """Return the card that a destination is pushed with, whose picture is drawn into the folder."""
    layer = target.layers[0]
    picture = draw(folder, target.entry, length=target.length, heads=layer.heads, is_causal=layer.is_causal)
    return dataclasses.replace(card, place=push_to, picture=picture)


def _push(folder: Path, checkpoint: Checkpoint, push_to: str, private: bool | None, token: str | bool | None) -> str:
    message = f"Convert {checkpoint.name if checkpoint.is_from_hub else checkpoint.root.name} to sparse attention"
    try:
        return str(push_folder(folder, push_to, message=message, private=private, token=token).commit_url)
    except PushError as error:
        raise PushError(f"{error}; {folder} is whole, and the same call pushes it without converting again") from None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
