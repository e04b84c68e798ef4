"""Converting a dense checkpoint into a sparse one."""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from hf_sparse.conversion import shards
from hf_sparse.conversion.calibration import calibrated, plan_calibration
from hf_sparse.conversion.companions import Companions, plan_companions
from hf_sparse.conversion.density import mean_density
from hf_sparse.conversion.destination import check_destination, check_space, partial_folder
from hf_sparse.conversion.model_card import card
from hf_sparse.conversion.progress import counting
from hf_sparse.conversion.report import ConversionReport
from hf_sparse.conversion.source import INDEX, Checkpoint, open_checkpoint
from hf_sparse.conversion.target import Target, plan_target
from hf_sparse.conversion.verify import wide_open_difference
from hf_sparse.conversion.weights import PlannedWeights, plan_weights
from hf_sparse.patterns import Pattern

_README = PurePosixPath("README.md")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    pattern: Pattern,
    *,
    max_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
    calibrate: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert a dense checkpoint into a sparse one; see :func:`hf_sparse.convert`."""
    started = time.monotonic()
    checkpoint = open_checkpoint(source, revision=revision, token=token)
    wanted = check_destination(destination, source=checkpoint.root, overwrite=overwrite)
    sizes: dict[str, Any] = {"max_length": max_length, "image_size": image_size, "positions": positions}
    target = plan_target(checkpoint, pattern, layers=layers, **sizes)
    calibration = None if calibrate is None else plan_calibration(calibrate, checkpoint, target)
    centroids: dict[str, Tensor] = {}
    weights = plan_weights(checkpoint, target, None if calibration is None else centroids)
    companions = plan_companions(checkpoint, target, raises_limits=(max_length, image_size) != (None, None))
    size = sum(shard.size for shard in weights.shards) + companions.size
    density = mean_density(target, target.length)
    check_space(wanted, size)
    if calibration is not None:
        # before anything is written, and after all that can be refused
        centroids.update(calibrated(checkpoint, target, calibration))
    with partial_folder(wanted, overwrite=overwrite) as folder:
        with counting(size, progress) as count:
            _write(folder, checkpoint, target, weights, companions, count, is_calibrated=calibration is not None)
        difference, note = None, "not compared: verify was off"
        if verify:
            difference, note = wide_open_difference(checkpoint.folder, folder / checkpoint.inner, target)
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
        moved=weights.moved,
        tiled=weights.tiled,
        added=weights.added,
        dropped=weights.dropped,
        files_carried=tuple(map(str, companions.carried)),
        files_raised=tuple(sorted(map(str, companions.rewritten))),
        files_left_behind=companions.left_behind,
        density=density,
        wide_open_difference=difference,
        wide_open_note=note,
        rotary=target.rotary,
        calibration=None if calibration is None else calibration.note,
        seconds=time.monotonic() - started,
    )


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    target: Target,
    weights: PlannedWeights,
    companions: Companions,
    count: Callable[[int], None],
    *,
    is_calibrated: bool,
) -> None:
    """Write everything the destination holds."""
    inner = folder / checkpoint.inner
    inner.mkdir(parents=True, exist_ok=True)
    for shard in weights.shards:
        shards.write_shard(inner / shard.name, shard.pieces, shard.metadata, count)
    if weights.index is not None:
        _write_json(inner / INDEX, weights.index)
    _write_json(inner / "config.json", target.config_json(checkpoint.config, companions.separator))
    for path in companions.carried:
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if path not in companions.rewritten:
            shutil.copyfile(checkpoint.root / path, place)
        count((checkpoint.root / path).stat().st_size)
    for path, text in companions.rewritten.items():
        (folder / path).write_text(text, encoding="utf-8")
    held = (folder / _README).read_text(encoding="utf-8") if _README in companions.carried else None
    name = _public_name(checkpoint)
    text = card(held, name=name, inner=checkpoint.inner, target=target, is_calibrated=is_calibrated)
    (folder / _README).write_text(text, encoding="utf-8")


def _public_name(checkpoint: Checkpoint) -> str:
    """Return a name that may be published: the Hub's id, or the last part of a local folder."""
    return checkpoint.name if checkpoint.is_from_hub else checkpoint.root.name


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
