"""What a conversion did."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Count:
    """How many tensors, and how many numbers they hold."""

    tensors: int = 0
    numbers: int = 0

    def __str__(self) -> str:
        return f"{self.numbers:,} in {self.tensors:,} tensor{'' if self.tensors == 1 else 's'}"


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: the checkpoint that was converted; of the Hub's, with the commit.
        destination: the folder of the sparse one.
        model_type: of the sparse checkpoint.
        pattern: the pattern of the layers that ``layers`` does not name, as plain values.
        layers: patterns of single layers, or "dense".
        max_length_before: longest input of the source, in tokens.
        max_length: longest input of the destination, in tokens.
        image_size_before: height and width of the source's images, in pixels; None where it reads text.
        image_size: height and width of the destination's images, in pixels; None where it reads text.
        moved: parameters that stay as they were, byte for byte.
        positions: how positions were asked to reach a longer text; None where nothing was asked for.
        tiled: parameters of the tables of positions, as long as they are now, tiled or interpolated; none where the length
            stays.
        added: parameters that start as copies of others, and centroids that were calibrated.
        dropped: what was left out: buffers of older versions, which models make anew, and weights that the pattern of a sparse
            source owned and the new one does not.
        files_carried: files beside the weights and config.json, as they were but for the limits.
        files_raised: those of them whose limits of length were raised, or that gained a field.
        files_left_behind: files that hold the dense model in other formats, or belong to its training.
        files_resumed: weights files that were taken over from a conversion that was killed.
        density: pairs of tokens read, over all pairs, at ``max_length``, averaged over layers and heads; without the
            global tokens that a task or a call marks.
        wide_open_difference: the largest absolute difference between outputs of the source and of the destination with
            every pattern wide open, or as it is where the source is sparse itself; None where they were not compared.
        wide_open_note: what was compared, or why not.
        wide_open_bytes: memory that the comparison took, at most, beside what the process held before; None where nothing was
            compared or the system does not say.
        checksums: SHA-256 of every file of the destination, by path.
        rotary: what the config now says of rotary positions, where that has changed; else None.
        calibration: what was calibrated on which text, in words; None where nothing was.
        pushed_to: address of the commit on the Hub; None where nothing was pushed.
        imported_from: class of a source that is sparse itself; None where it is dense.
        seconds: how long it took.
    """

    source: str
    destination: str
    model_type: str
    pattern: dict[str, Any]
    layers: dict[str, Any]
    max_length_before: int
    max_length: int
    image_size_before: tuple[int, int] | None
    image_size: tuple[int, int] | None
    positions: str | None
    moved: Count
    tiled: Count
    added: Count
    dropped: Count
    files_carried: tuple[str, ...]
    files_raised: tuple[str, ...]
    files_left_behind: tuple[str, ...]
    files_resumed: tuple[str, ...]
    density: float
    wide_open_difference: float | None
    wide_open_note: str
    wide_open_bytes: int | None
    checksums: dict[str, str]
    rotary: dict[str, Any] | None
    calibration: str | None
    pushed_to: str | None
    imported_from: str | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    def table(self) -> Table:
        """Return the report as a table for ``rich`` to print."""
        table = Table(show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        fields = ", ".join(f"{key}={value}" for key, value in self.pattern.items() if key != "key")
        rows = [
            ("source", self.source if self.imported_from is None else f"{self.source} (a {self.imported_from})"),
            ("destination", self.destination),
            ("model type", self.model_type),
            ("pattern", f"{self.pattern['key']}: {fields}"),
            ("longest input", f"{self._reads(before=True)} -> {self._reads()}"),
            ("density", f"{self.density:.4f} of all pairs at {self.max_length:,} tokens"),
            ("parameters moved", str(self.moved)),
            (f"positions {self._lengthened}", str(self.tiled)),
            ("parameters added", str(self.added)),
            ("not taken over", str(self.dropped)),
            ("files carried", _listed(self.files_carried)),
            ("limits raised in", _listed(self.files_raised)),
            ("files left behind", _listed(self.files_left_behind)),
            *([("rotary positions", json.dumps(self.rotary))] if self.rotary else []),
            *([("calibrated", self.calibration)] if self.calibration else []),
            *([("taken over", _listed(self.files_resumed))] if self.files_resumed else []),
            (self._comparison, self._wide_open()),
            *[
                ("SHA-256", f"{digest} {path}")
                for path, digest in self.checksums.items()
                if path.endswith(".safetensors")
            ],
            *([("pushed to", self.pushed_to)] if self.pushed_to else []),
            ("seconds", f"{self.seconds:.1f}"),
        ]
        if self.layers:
            named = "; ".join(
                f"{key}: {value if value == 'dense' else value['key']}" for key, value in self.layers.items()
            )
            rows.insert(4, ("layers", named))
        return rows

    def _reads(self, *, before: bool = False) -> str:
        if before:
            return inputs_in_words(self.max_length_before, self.image_size_before)
        return inputs_in_words(self.max_length, self.image_size)

    @property
    def _lengthened(self) -> str:
        return "tiled" if self.positions in (None, "tile") and self.image_size is None else "interpolated"

    @property
    def _comparison(self) -> str:
        return "wide open" if self.imported_from is None else "same pattern"

    def _wide_open(self) -> str:
        if self.wide_open_difference is None:
            return self.wide_open_note
        memory = "" if self.wide_open_bytes is None else f", at most {self.wide_open_bytes / 1e6:,.0f} MB of memory"
        return f"largest difference {self.wide_open_difference:.1e} ({self.wide_open_note}{memory})"

    def __str__(self) -> str:
        positions = f"positions {self._lengthened}: {self.tiled}"
        rotary = f"Rotary positions: {json.dumps(self.rotary)}. " if self.rotary else ""
        calibrated = f"Calibrated: {self.calibration}. " if self.calibration else ""
        pushed = f" Pushed to {self.pushed_to}." if self.pushed_to else ""
        return (
            f"Converted {self.source} to {self.destination} ({self.model_type}, pattern {self.pattern['key']}): reads "
            f"{self._reads()} where it read {self._reads(before=True)}, and {self.density:.2%} of all pairs at that length. "
            f"Parameters moved: {self.moved}; {positions}; added: {self.added}. {rotary}{calibrated}"
            f"{self._comparison.capitalize()}: {self._wide_open()}. {self.seconds:.1f} s.{pushed}"
        )


def inputs_in_words(length: int, image_size: tuple[int, int] | None) -> str:
    """Return what a model reads at most, in words."""
    if image_size is None:
        return f"{length:,} tokens"
    return f"images of {image_size[0]:,} x {image_size[1]:,} pixels ({length:,} tokens)"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if names else "none"
