"""A progress bar for functions that take long, where a person watches a terminal; nothing anywhere else."""

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from halfeven.distributed import rank

T = TypeVar("T")

SWITCH = "HALFEVEN_PROGRESS"
"""Environment variable that turns all bars off where it is "0"."""
SECONDS_BEFORE = 0.5
"""Seconds of work before a bar appears, so that short work shows none."""

_one_bar = threading.Lock()
"""Held while a bar may be shown: functions that call each other show that of the outermost."""


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr until the context ends.

    In a pipe, a file, a notebook, or a process of a distributed run other than the first, nothing is shown.

    Args:
        what: the work, for example "Calibrating".
        total: number of steps; None where it is not known.

    Yields:
        A function to call after each step.
    """
    # Not blocking: a function inside of another finds the lock taken, and shows nothing.
    if not _is_watched() or not _one_bar.acquire(blocking=False):
        yield lambda: None
        return
    counted = (BarColumn(bar_width=24), MofNCompleteColumn()) if total else ()
    text = TextColumn("{task.description}", style="bold", markup=False)
    bar = Progress(SpinnerColumn(), text, *counted, TimeElapsedColumn(), console=_error_console(), transient=True)
    task = bar.add_task(what, total=total)
    later = threading.Timer(SECONDS_BEFORE, bar.start)
    later.daemon = True
    later.start()
    try:
        yield lambda: bar.advance(task)
    finally:
        # Joined before the bar is stopped: the timer may be starting it at this moment.
        later.cancel()
        later.join()
        bar.stop()
        _one_bar.release()


def advancing(items: Iterable[T], advance: Callable[[], None]) -> Iterator[T]:
    """Yield items, and call a function after each."""
    for item in items:
        yield item
        advance()


def count_of(loader: Iterable[Any], most: int | None = None) -> int | None:
    """Return how many batches of a loader will be read; None where the loader does not know."""
    try:
        count = len(loader) if isinstance(loader, Sized) else None
    except Exception:  # some loaders have a length and raise an error when they are asked for it
        return None
    return count if most is None or count is None else min(count, most)


def _is_watched() -> bool:
    stream = sys.stderr
    return (
        os.environ.get(SWITCH) != "0"
        and stream is not None
        and stream.isatty()
        and threading.current_thread() is threading.main_thread()
        and rank() == 0
        and _error_console().is_interactive
    )


def _error_console() -> Console:
    return Console(stderr=True, emoji=False)
