"""The bar: only in a terminal, and only for work that takes a while."""

import io

import pytest
from rich.console import Console

from hf_sparse.conversion import progress


@pytest.mark.parametrize(
    ("is_terminal", "patience", "draws"), [(True, 0.0, True), (True, 60.0, False), (False, 0.0, False)]
)
def test_a_bar_is_drawn_in_a_terminal_once_patience_ends(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, patience: float, draws: bool
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "_PATIENCE", patience)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=is_terminal))
    with progress.counting(4_000_000, None) as count:
        for _ in range(4):
            count(1_000_000)
    assert ("converting" in shown.getvalue()) is draws
    assert ("4.0/4.0 MB" in shown.getvalue()) is draws


def test_steps_are_counted_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=True))
    with progress.counting(3, None, doing="comparing") as count:
        for _ in range(3):
            count(1)
    assert "comparing" in shown.getvalue()
    assert "3/3" in shown.getvalue()


def test_a_caller_s_own_progress_is_told_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    with progress.counting(5, lambda *seen: told.append(seen)) as count:
        count(2)
        count(3)
    assert told == [(2, 5), (5, 5)]
