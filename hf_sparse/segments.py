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
    """

    row: int
    start: int
    stop: int
    invalid: tuple[int, ...] = ()
    global_positions: tuple[int, ...] | None = None

    def is_like(self, other: "Segment", row: int) -> bool:
        """Say whether this is the same stretch as another, in the given row."""
        return dataclasses.replace(other, row=row) == self


def places(segment: Segment, tokens: int, nodes: int) -> slice | Tensor:
    """Return where the tokens of a sequence stand in its row, and behind them its nodes.

    Args:
        segment: the sequence.
        tokens: tokens of the row; nodes come behind them.
        nodes: nodes of this sequence: the first ones of the row.
    """
    if not nodes or segment.stop == tokens:
        return slice(segment.start, segment.stop + nodes)
    return torch.cat([torch.arange(segment.start, segment.stop), torch.arange(tokens, tokens + nodes)])


def find_segments(
    batch: int,
    tokens: int,
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    global_mask: Tensor | None = None,
    reads_padding: bool = False,
) -> list[Segment]:
    """Cut a batch into its sequences.

    Args:
        batch: rows.
        tokens: columns.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        document_ids: int ``[B, S]``; tokens of equal id in a row are one document; below 0 is padding.
        global_mask: bool ``[B, S]``, True = a global token.
        reads_padding: keep padding at the ends inside the segment, as invalid positions.

    Returns:
        Segments without padding at their ends (unless ``reads_padding``); rows without real tokens have none.

    Raises:
        ValueError: if the tokens of a document do not stand together.
    """
    real = torch.ones(batch, tokens, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    documents = None if document_ids is None else document_ids.cpu()
    if documents is not None:
        real = real & (documents >= 0)
    is_global = None if global_mask is None else global_mask.cpu()
    all_real = bool(real.all())
    segments: list[Segment] = []
    for row in range(batch):
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
            segments.append(Segment(row, start, stop, invalid, positions))
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


def _documents(ids: Tensor) -> list[tuple[int, int]]:
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0).tolist()
    runs = list(zip(values.tolist(), [0, *ends[:-1]], ends, strict=True))
    names = [value for value, _, _ in runs if value >= 0]
    if len(set(names)) < len(names):
        raise ValueError("document_ids: the tokens of a document must stand together in a row")
    return [(start, stop) for value, start, stop in runs if value >= 0]
