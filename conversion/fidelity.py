"""The fidelity report: how near sparse models stay to the dense checkpoint on texts, and what they cost."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse.conversion import costs
from hf_sparse.conversion.comparison import compare, load_sparse, mean_loss, read
from hf_sparse.conversion.fidelity_report import DenseCosts, FidelityReport, PatternFidelity
from hf_sparse.conversion.layer_plan import LayerPlan, layer_key, pattern_name
from hf_sparse.conversion.progress import counting
from hf_sparse.conversion.reading import MOST_PIECES, Reading, open_reading
from hf_sparse.conversion.target import Target, plan_target
from hf_sparse.integration.density import layer_density
from hf_sparse.integration.kept import unkept_reason
from hf_sparse.patterns import Band, Pattern

# lengths at which loss is measured, in lengths of the dense model
_MULTIPLES = (1, 2, 4, 8)


def inspect_fidelity(
    source: str | os.PathLike[str],
    patterns: Sequence[Pattern | LayerPlan],
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
) -> FidelityReport:
    """Compare sparse models with the dense one; see :func:`hf_sparse.inspect_fidelity`."""
    hub: dict[str, Any] = {"revision": revision, "token": token, "allow_pickle": allow_pickle}
    reading = open_reading(source, texts, length=length, max_length=max_length, **hub)
    inspection = plan_inspection(reading, patterns, max_length=max_length, positions=positions, layers=layers)
    return inspection.report(converted)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What is compared, and on what; all that can be wrong with it has been told.

    Attributes:
        reading: the dense checkpoint and its texts.
        patterns: patterns, and plans by layer.
        targets: what the checkpoint becomes under each.
        band: what it becomes under a band of single tokens, as long as these.
        lengths: tokens at which loss is measured.
        longest: tokens at which operations and memory are.
    """

    reading: Reading
    patterns: tuple[Pattern | LayerPlan, ...]
    targets: tuple[Target, ...]
    band: Target
    lengths: tuple[int, ...]
    longest: int

    def report(self, converted: str | os.PathLike[str] | None = None) -> FidelityReport:
        """Compare, and return the report.

        Args:
            converted: a folder that was converted with the only pattern, whose weights are read; None takes the source's.
        """
        started, reading = time.monotonic(), self.reading
        # every other piece was for choosing a plan
        is_apart = any(isinstance(one, LayerPlan) for one in self.patterns) and len(reading.pieces) > 1
        judge = _Judge(reading, reading.pieces[1::2] if is_apart else reading.pieces, self.lengths, self.longest)
        checkpoint, found = reading.checkpoint, []
        folder = checkpoint.folder if converted is None else Path(converted) / checkpoint.inner
        with counting(len(self.targets) * (len(judge.pieces) + 2) + 1, None, doing="comparing") as count:
            dense = judge.costs_of_dense(self.band)
            count(1)
            for one, target in zip(self.patterns, self.targets, strict=True):
                found.append(judge.fidelity_of(one, target, load_sparse(target, folder), count))
        return FidelityReport(
            source=checkpoint.name,
            texts=reading.texts.name,
            model_type=reading.target.model_type,
            layers=tuple(layer_key(layer) for layer in reading.target.layers),
            length=reading.length,
            pieces=len(judge.pieces),
            is_chosen_apart=is_apart,
            objective=judge.objective,
            lengths=self.lengths if judge.objective else (),
            longest=self.longest,
            dense=dense,
            patterns=tuple(found),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            seconds=time.monotonic() - started,
        )


def plan_inspection(
    reading: Reading,
    patterns: Sequence[Pattern | LayerPlan],
    *,
    max_length: int | None = None,
    positions: str | None = None,
    layers: Mapping[int | str, Pattern | str] | None = None,
) -> Inspection:
    """Say what is compared.

    Args:
        reading: the dense checkpoint and its texts.
        patterns: patterns, and plans by layer; at least one.
        max_length: tokens of the longest text; None takes multiples of the dense model's length, as far as a text fills them.
        positions: how rotary positions reach longer texts.
        layers: maps layers to patterns or to "dense", for what is no plan.

    Raises:
        ValueError: if there is no pattern, or one does not fit the checkpoint or needs more than plain texts.
    """
    if not patterns:
        raise ValueError("there is nothing to inspect: give at least one pattern")
    own = reading.target.length_before
    most = reading.texts.longest if max_length is None else min(max_length, reading.texts.longest)
    wanted = {reading.length, *(own * times for times in _MULTIPLES)}
    lengths = tuple(sorted(one for one in wanted if one <= most))
    longest = max(lengths) if max_length is None else max_length
    sizes: dict[str, Any] = {"max_length": longest if longest > own else None, "positions": positions}
    targets = tuple(_target(reading, one, layers, sizes) for one in patterns)
    band = plan_target(reading.checkpoint, Band(radius=0), **sizes)
    return Inspection(reading, tuple(patterns), targets, band, lengths, longest)


def _target(
    reading: Reading,
    one: Pattern | LayerPlan,
    layers: Mapping[int | str, Pattern | str] | None,
    sizes: dict[str, Any],
) -> Target:
    """Return what the checkpoint becomes under a pattern or a plan.

    Raises:
        ValueError: if it does not fit, or needs more than plain texts.
    """
    if isinstance(one, LayerPlan):
        return plan_target(reading.checkpoint, one.pattern, layers=one.layers, **sizes)
    target = plan_target(reading.checkpoint, one, layers=layers, **sizes)
    for pattern in (target.entry.pattern, *(pattern for _, pattern in target.entry.layers)):
        if pattern is not None and pattern.takes_segments:
            raise ValueError(
                f"pattern {pattern.key!r} with segments='given' needs segment_ids, which plain texts have not"
            )
    return target


class _Judge:
    """What all patterns of a report are measured with."""

    def __init__(self, reading: Reading, pieces: Sequence[Tensor], lengths: Sequence[int], longest: int) -> None:
        self.reading, self.pieces, self.lengths, self.longest = reading, pieces, lengths, longest
        self.dense, self.has_head = reading.load_dense()
        self.objective = self._objective()
        # tokens of no text in particular, for what a pass costs
        self.row = pieces[0].repeat(1, -(-longest // reading.length))[:, :longest]

    def _objective(self) -> str | None:
        """Return what the loss is of: "causal" or "masked"; None where the checkpoint is no language model of one stack."""
        is_language_model = self.has_head and read(self.dense, self.pieces[0])[1] is not None
        if not is_language_model or self.dense.config.is_encoder_decoder:
            return None
        if all(layer.is_causal for layer in self.reading.target.layers):
            return "causal"
        return None if self.reading.texts.mask is None else "masked"

    def losses(self, model: Any, *, is_dense: bool = False) -> tuple[float, ...]:
        """Return the loss at each length; the dense model reads what is longer than its own in parts."""
        if self.objective is None:
            return ()
        texts, own, found = self.reading.texts, self.reading.target.length_before, []
        for length in self.lengths:
            room = length - texts.special
            rows = [text[:room] for text in texts.documents if len(text) >= room]
            rows = rows[: max(1, MOST_PIECES * self.reading.length // length)]
            found.append(mean_loss(model, texts, rows, min(length, own) if is_dense else length, own, self.objective))
        return tuple(found)

    def costs(self, model: Any) -> tuple[int, int | None]:
        """Return the operations of linear layers in a pass at the longest length, and its peak memory."""
        with costs.counting_linear(model) as done:
            read(model, self.row)
        return sum(done), costs.peak_bytes(lambda: read(model, self.row))

    def costs_of_dense(self, band: Target) -> DenseCosts:
        """Return the losses of the dense model, and what it costs at the longest length, its positions made as long.

        Args:
            band: the checkpoint with a band, at the longest length: read densely it is the dense model.
        """
        model = load_sparse(band, self.reading.checkpoint.folder)
        model.set_attn_implementation("sdpa")
        linear, peak = self.costs(model)
        found = compare(self.dense, self.dense, band, self.pieces[0])
        operations = [
            found.calls[key]
            * costs.attention_operations(layer_density(None, layer, self.longest), found.shapes[key], self.longest)
            for key, layer in ((layer_key(layer), layer) for layer in band.layers)
        ]
        return DenseCosts(self.losses(self.dense, is_dense=True), linear + sum(operations), peak)

    def fidelity_of(
        self, one: Pattern | LayerPlan, target: Target, sparse: Any, count: Callable[[int], None]
    ) -> PatternFidelity:
        """Return how near one pattern stays, and what it costs.

        Args:
            one: the pattern, or the plan that it is from.
            target: what the checkpoint becomes.
            sparse: the model.
            count: told of each step that is done.
        """
        found = []
        for row in self.pieces:
            found.append(compare(self.dense, sparse, target, row, has_head=self.has_head))
            count(1)
        losses = self.losses(sparse)
        count(1)
        keys = [layer_key(layer) for layer in target.layers]
        shapes, calls = [found[0].shapes[key] for key in keys], [found[0].calls[key] for key in keys]
        patterns = [target.entry.pattern_of(layer.stack, layer.index) for layer in target.layers]
        linear, peak = self.costs(sparse)
        # a layer that is called several times takes as long as several
        turns = [at for at, count_of in enumerate(calls) for _ in range(count_of)]
        layers = [target.layers[at] for at in turns]
        timings = costs.attention_timings([patterns[at] for at in turns], layers, shapes[0])
        count(1)
        reasons = [reason for reason in map(unkept_reason, patterns) if reason is not None]
        kept = tuple(tuple(torch.stack([held.shares[key] for held in found]).mean(0).tolist()) for key in keys)
        operations = [
            times * costs.attention_operations(layer_density(pattern, layer, self.longest), shape, self.longest)
            for pattern, layer, shape, times in zip(patterns, target.layers, shapes, calls, strict=True)
        ]
        divergences = [held.divergence for held in found if held.divergence is not None]
        entry, plan = target.entry.to_dict(), one if isinstance(one, LayerPlan) else None
        return PatternFidelity(
            name=pattern_name(one) if isinstance(one, Pattern) else f"auto, density {one.budget:g}",
            pattern=entry["pattern"],
            layers=entry["layers"],
            plan=None if plan is None else plan.to_dict(),
            density=target.density(self.reading.length),
            density_longest=target.density(self.longest),
            kept=None if reasons else kept,
            kept_note=reasons[0] if reasons else "",
            divergence=sum(divergences) / len(divergences) if divergences else None,
            cosine=sum(held.cosine for held in found) / len(found),
            losses=losses,
            operations=linear + sum(operations),
            peak_bytes=peak,
            timings=timings,
            cheaper_from=costs.cheaper_from(timings),
        )
