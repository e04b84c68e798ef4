"""What was found of how near sparse models stay to a dense checkpoint, and what they cost."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_sparse.conversion.costs import Timing


@dataclass(frozen=True)
class DenseCosts:
    """The dense model beside which others are measured.

    Attributes:
        losses: at each length of the report, in nats; a text that is longer than the model reads is read in parts.
        operations: floating-point operations of a forward pass at the longest length, its positions made as long.
        peak_bytes: memory of that pass beyond the weights; None where the system does not tell.
    """

    losses: tuple[float, ...]
    operations: int
    peak_bytes: int | None


@dataclass(frozen=True)
class PatternFidelity:
    """How near the model under one pattern stays to the dense one, and what it costs.

    Attributes:
        name: the pattern in words.
        pattern: of the layers that ``layers`` does not name, as plain values.
        layers: patterns of single layers, or "dense".
        plan: the plan by layer that this is, as plain values; None where it is none.
        density: pairs read, over all pairs, at the length of a piece, mean over layers and heads; of a pattern that looks at
            content at most so many.
        density_longest: the same at the longest length.
        kept: by layer and head, the share of the dense model's attention on pairs which the pattern allows, mean over queries
            and pieces; None where it cannot be told.
        kept_note: why not; else empty.
        divergence: Kullback-Leibler divergence of the distributions over the vocabulary, from the dense model's to the sparse
            one's, mean over tokens, in nats; None without a language-model head.
        cosine: of the last hidden states of both, mean over tokens.
        losses: at each length of the report, in nats, on the same tokens as the dense model's; a text is read whole.
        operations: floating-point operations of a forward pass at the longest length: two for each weight of a linear layer and
            token, and 4 D for each pair that a head of width D reads.
        peak_bytes: memory of that pass beyond the weights; None where the system does not tell.
        timings: attention of all layers, dense and sparse, at doubling lengths.
        cheaper_from: tokens from which on sparse attention was faster at every length timed; None where there is none.
    """

    name: str
    pattern: dict[str, Any]
    layers: dict[str, Any]
    plan: dict[str, Any] | None
    density: float
    density_longest: float
    kept: tuple[tuple[float, ...], ...] | None
    kept_note: str
    divergence: float | None
    cosine: float
    losses: tuple[float, ...]
    operations: int
    peak_bytes: int | None
    timings: tuple[Timing, ...]
    cheaper_from: int | None

    @property
    def mean_kept(self) -> float | None:
        """The kept share, mean over layers and heads; None where it cannot be told."""
        if self.kept is None:
            return None
        by_layer = [sum(heads) / len(heads) for heads in self.kept]
        return sum(by_layer) / len(by_layer)

    @property
    def least_kept(self) -> tuple[float, int, int] | None:
        """The least share, and the index of its layer and head; None where it cannot be told."""
        if self.kept is None:
            return None
        return min((share, layer, head) for layer, heads in enumerate(self.kept) for head, share in enumerate(heads))


@dataclass(frozen=True)
class FidelityReport:
    """How near sparse models stay to a dense checkpoint on texts, and what they cost.

    Attributes:
        source: the dense checkpoint; of the Hub's, with the commit.
        texts: the file of the texts.
        model_type: of the dense model.
        layers: names of the self-attention layers, in order.
        length: tokens of a piece of text, on which the models are compared.
        pieces: how many.
        is_chosen_apart: whether a plan among the patterns was chosen on other pieces than these.
        objective: what the losses are of, "masked" (15 % of the tokens hidden, the same for all) or "causal"; None where the
            checkpoint is no language model.
        lengths: tokens at which losses were measured; empty without an objective.
        longest: tokens at which operations and memory were.
        dense: the dense model.
        patterns: the sparse ones, in the order that they were given in.
        threads: of the processor, that torch used.
        torch: its version.
        seconds: how long it took.
    """

    source: str
    texts: str
    model_type: str
    layers: tuple[str, ...]
    length: int
    pieces: int
    is_chosen_apart: bool
    objective: str | None
    lengths: tuple[int, ...]
    longest: int
    dense: DenseCosts
    patterns: tuple[PatternFidelity, ...]
    threads: int
    torch: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return _plain(dataclasses.asdict(self))

    def table(self) -> Table:
        """Return the report as a table for ``rich`` to print."""
        table = Table(*self.head(), title=self.title(), caption=self.caption())
        for row in self.rows():
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return the table in Markdown for a model card, and what was compared on; without the folders of this machine."""
        rows = [self.head(), ["---"] * len(self.head()), *self.rows()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        pieces = f"{self.pieces} piece{'' if self.pieces == 1 else 's'} of {self.length:,} tokens"
        return "\n".join([f"On {pieces} of `{Path(self.texts).name}`.", "", *lines, "", f"{self.caption()}."])

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as a page that needs no other file: the table, and a map of the kept shares for each pattern."""
        from hf_sparse.conversion.fidelity_page import page

        Path(path).write_text(page(self), encoding="utf-8")

    def title(self) -> str:
        """Return what was compared, in words."""
        pieces = f"{self.pieces} piece{'' if self.pieces == 1 else 's'} of {self.length:,} tokens"
        return f"{self.source} on {pieces} of {self.texts}"

    def caption(self) -> str:
        """Return what the numbers are, in words."""
        said = [
            "kept: share of the dense model's attention on the pairs that are read",
            f"KL (nats) and cosine: against the dense model, at {self.length:,} tokens",
        ]
        if self.objective:
            said.append(f"loss: {self.objective}, in nats; what is longer than it reads, dense reads in parts")
        said.append(f"operations and memory: a forward pass at {self.longest:,} tokens")
        said.append(f"cheaper from: attention alone, timed on {self.threads} thread{'' if self.threads == 1 else 's'}")
        if any(one.plan is not None for one in self.patterns):
            where = "on other pieces" if self.is_chosen_apart else "on the same pieces: give more text to judge it"
            said.append(f"auto was chosen {where}")
        return "; ".join(said)

    def head(self) -> list[str]:
        """Return the names of the columns."""
        losses = [f"loss at {length:,}" for length in self.lengths]
        return ["pattern", "density", "kept", "least kept", "KL", "cosine", *losses, "GFLOP", "MiB", "cheaper from"]

    def rows(self) -> list[list[str]]:
        """Return the rows as text, the dense model first."""
        losses = [f"{loss:.4f}" for loss in self.dense.losses]
        dense = ["dense", "", "1", "", "0", "1", *losses, *_said(self.dense), ""]
        return [dense, *(self._row(one) for one in self.patterns)]

    def _row(self, one: PatternFidelity) -> list[str]:
        kept, least = one.mean_kept, one.least_kept
        return [
            one.name,
            f"{one.density:.4f}",
            "-" if kept is None else f"{kept:.4f}",
            "-" if least is None else f"{least[0]:.3f} (layer {self.layers[least[1]]}, head {least[2]})",
            "-" if one.divergence is None else f"{one.divergence:.4f}",
            f"{one.cosine:.4f}",
            *(f"{loss:.4f}" for loss in one.losses),
            *_said(one),
            f"{one.cheaper_from:,}" if one.cheaper_from else f"not up to {one.timings[-1].length:,}",
        ]


def _said(one: DenseCosts | PatternFidelity) -> list[str]:
    """Return operations and memory as text."""
    return [f"{one.operations / 1e9:,.1f}", "-" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:,.0f}"]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(held) for key, held in value.items()}
    return [_plain(held) for held in value] if isinstance(value, tuple | list) else value
