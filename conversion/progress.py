"""A progress bar, for a person who waits."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# work that is done sooner shows no bar
_PATIENCE = 2.0


@contextlib.contextmanager
def counting(
    total: int, told: Callable[[int, int], None] | None, *, doing: str | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of bytes as they are written, or of steps as they are done.

    Args:
        total: bytes of the whole work, or steps.
        told: called with what is done and what there is in all; None draws a bar in a terminal, once the work has taken
            over two seconds.
        doing: what is done in steps, for the bar; None where bytes are written.
    """
    done = 0
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        console = Console(stderr=True)
        draw: Callable[[int], None] | None = None

        def count(more: int) -> None:
            nonlocal done, draw
            done += more
            if told is not None:
                told(done, total)
            elif draw is not None:
                draw(done)
            elif console.is_terminal and time.monotonic() - started > _PATIENCE:
                draw = _bar(stack, console, total, doing)

        yield count


def _bar(stack: contextlib.ExitStack, console: Console, total: int, doing: str | None) -> Callable[[int], None]:
    done = DownloadColumn() if doing is None else MofNCompleteColumn()
    columns = TextColumn(doing or "converting"), BarColumn(), done, TimeRemainingColumn()
    bar = stack.enter_context(Progress(*columns, console=console, transient=True))
    task = bar.add_task("", total=total)
    return lambda done: bar.update(task, completed=done)
