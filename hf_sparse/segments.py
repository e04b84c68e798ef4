"""Segments: the stretches of real tokens in a padded or packed batch, each a sequence of its own."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One sequence of a batch.

    Attributes:
        row: row of the batch.
        start: index of its first token in the row; logical position 0.
        stop: index behind its last token.
        invalid: logical positions inside it that hold no real token.
        global_positions: logical positions of its global tokens; None where no global mask was given.
        spans: logical positions of the first and behind the last token of each of its nodes; None where the call names none.
        first_node: the first of its nodes among those of the row.
    """

    row: int
    start: int
    stop: int
    invalid: tuple[int, ...] = ()
    global_positions: tuple[int, ...] | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    first_node: int = 0

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.stop - self.start

    def is_like(self, other: "Segment", row: int) -> bool:
        """Say whether this is the same stretch as another, in the given row."""
        return dataclasses.replace(other, row=row) == self


def places(segment: Segment, tokens: int, nodes: int) -> slice | Tensor:
    """Return where the tokens of a sequence stand in its row, and behind them its nodes.

    Args:
        segment: the sequence.
        tokens: tokens of the row; nodes come behind them.
        nodes: nodes of this sequence, which stand together.
    """
    first = tokens + segment.first_node
    if not nodes or segment.stop == first:
        return slice(segment.start, segment.stop + nodes)
    stretches = (segment.start, segment.stop), (first, first + nodes)
    return torch.cat([torch.arange(*stretch, device="cpu") for stretch in stretches])


def find_segments(
    batch: int,
    tokens: int,
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    global_mask: Tensor | None = None,
    reads_padding: bool = False,
    segment_ids: Tensor | None = None,
    most_nodes: int = 0,
) -> list[Segment]:
    """Cut a batch into its sequences.

    Args:
        batch: rows.
        tokens: tokens of a row; what masks say of columns behind them is not read.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        document_ids: int ``[B, S]``; tokens of equal id in a row are one document; below 0 is padding.
        global_mask: bool ``[B, S]``, True = a global token.
        reads_padding: keep padding at the ends inside the segment, as invalid positions.
        segment_ids: int ``[B, S]``; neighbours of equal id in a document have a node together; below 0 is none.
        most_nodes: nodes that a row has room for, where there are ``segment_ids``.

    Returns:
        Segments without padding at their ends (unless ``reads_padding``); rows without real tokens have none.

    Raises:
        ValueError: if the tokens of a document do not stand together, or there are more nodes than there is room for.
    """
    real = (
        torch.ones(batch, tokens, dtype=torch.bool, device="cpu")
        if key_padding_mask is None
        else key_padding_mask.cpu()
    )
    real = real[:, :tokens]
    documents = None if document_ids is None else document_ids[:, :tokens].cpu()
    named = None if segment_ids is None else segment_ids[:, :tokens].cpu()
    if documents is not None:
        real = real & (documents >= 0)
    is_global = None if global_mask is None else global_mask.cpu()
    all_real = bool(real.all())
    segments: list[Segment] = []
    for row in range(batch):
        nodes = 0
        for start, stop in _documents(documents[row]) if documents is not None else [(0, tokens)]:
            if start == stop:
                continue
            invalid: tuple[int, ...] = ()
            if not all_real:
                held = real[row, start:stop].nonzero()[:, 0].tolist()
                if not held:
                    continue
                if not reads_padding:
                    start, stop = start + held[0], start + held[-1] + 1
                if len(held) < stop - start:
                    invalid = tuple((~real[row, start:stop]).nonzero()[:, 0].tolist())
            positions = None
            if is_global is not None:
                positions = tuple(is_global[row, start:stop].nonzero()[:, 0].tolist())
            spans = None if named is None else _spans(named[row, start:stop], real[row, start:stop])
            segments.append(Segment(row, start, stop, invalid, positions, spans, nodes))
            nodes += len(spans or ())
        if nodes > most_nodes:
            raise ValueError(f"row {row} has {nodes} segments, and the pattern has room for num_global={most_nodes}")
    return segments


def logical_length(key_positions: Tensor, is_real: Tensor, *, reads_padding: bool) -> int:
    """Return the tokens of a sequence of which only the positions of its keys are known.

    Args:
        key_positions: int64 ``[S]``, logical.
        is_real: bool ``[S]``, True = a real token.
        reads_padding: whether padding at the end counts.
    """
    counted = key_positions if reads_padding else key_positions[is_real]
    return max(1, int(counted.max()) + 1) if len(counted) else 1


def _spans(ids: Tensor, is_real: Tensor) -> tuple[tuple[int, int], ...]:
    """Return where the runs of equal ids that hold a real token begin and end."""
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    stops = counts.cumsum(0)
    running = torch.nn.functional.pad(is_real.long().cumsum(0), (1, 0))
    is_held = (values >= 0) & (running[stops] > running[stops - counts])
    return tuple(zip((stops - counts)[is_held].tolist(), stops[is_held].tolist(), strict=True))


def _documents(ids: Tensor) -> list[tuple[int, int]]:
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0).tolist()
    runs = list(zip(values.tolist(), [0, *ends[:-1]], ends, strict=True))
    names = [value for value, _, _ in runs if value >= 0]
    if len(set(names)) < len(names):
        raise ValueError("document_ids: the tokens of a document must stand together in a row")
    return [(start, stop) for value, start, stop in runs if value >= 0]
