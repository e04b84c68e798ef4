"""A progress bar over bytes, for a person who waits."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

# work that is done sooner shows no bar
_PATIENCE = 2.0


@contextlib.contextmanager
def counting(total: int, told: Callable[[int, int], None] | None) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told of bytes as they are written.

    Args:
        total: bytes of the whole work.
        told: called with the bytes written and the bytes in all; None draws a bar in a terminal, once the work has taken
            over two seconds.
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
                draw = _bar(stack, console, total)

        yield count


def _bar(stack: contextlib.ExitStack, console: Console, total: int) -> Callable[[int], None]:
    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    bar = stack.enter_context(Progress(*columns, console=console, transient=True))
    task = bar.add_task("converting", total=total)
    return lambda done: bar.update(task, completed=done)
