"""Interleaved timing: cells take turns, so that a machine whose speed drifts is as fair to one as to the next."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Cell:
    """One thing to time.

    Attributes:
        name: of the row of the table.
        what: "forward" or "forward+backward".
        run: does it once.
        facts: what else the result says of it: length, dropout, density.
    """

    name: str
    what: str
    run: Callable[[], Any]
    facts: dict[str, Any]


def time_cells(
    cells: Sequence[Cell],
    *,
    least: int,
    most: int,
    seconds: float,
    device: str,
    is_warm: Callable[[Cell], bool],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run every cell once in each round, and return what each took.

    Args:
        cells: what to run.
        least: rounds, at the least.
        most: rounds, at the most.
        seconds: after which no further round begins once ``least`` are done.
        device: "cpu" or "cuda".
        is_warm: whether a cell needs no run before the first round.
        tell: is told the cell that runs.

    Returns:
        For each cell its name, facts, the median in seconds, the fastest, and how many rounds there were.
    """
    for cell in cells:
        if not is_warm(cell):
            tell(f"{cell.name}, {cell.what}, warm-up")
            _seconds(cell, device)
    taken: list[list[float]] = [[] for _ in cells]
    start = time.perf_counter()
    rounds = 0
    while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
        for cell, held in zip(cells, taken, strict=True):
            tell(f"{cell.name}, {cell.what}, round {rounds + 1}")
            held.append(_seconds(cell, device))
        rounds += 1
    return [
        {
            "name": cell.name,
            "what": cell.what,
            **cell.facts,
            "seconds": statistics.median(held),
            "fastest": min(held),
            "rounds": rounds,
        }
        for cell, held in zip(cells, taken, strict=True)
    ]


def _seconds(cell: Cell, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    cell.run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
