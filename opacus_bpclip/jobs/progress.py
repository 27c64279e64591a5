"""A progress bar on stderr, drawn by rich between two steps and never during one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

# Seconds between two drawings.
_INTERVAL = 0.5
# Of a line in a file, which has no width of its own.
_WIDTH = 120


class Bar:
    """One bar. Drawing it in a thread, as rich does by default, would slow the measured steps.

    Args:
        progress: rich's own.
        text: what is being done.
        total: how many steps there are.
    """

    def __init__(self, progress: Progress, text: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(text, total=total, told="")
        self._drawn = time.monotonic()

    def advance(self) -> None:
        """Count a finished step, and draw the bar if that was last done some time ago."""
        self._progress.advance(self._task)
        if time.monotonic() - self._drawn > _INTERVAL:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def tell(self, **facts: str) -> None:
        """Show the latest facts beside the bar."""
        told = ", ".join(f"{name}={value}" for name, value in facts.items())
        self._progress.update(self._task, told=told)


@contextmanager
def progress_bar(text: str, total: int, *, shown: bool) -> Iterator[Bar]:
    """Yield a bar that is on stderr until the end of the block, if ``shown`` is set."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn("{task.percentage:.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
    )
    console = Console(stderr=True, width=None if sys.stderr.isatty() else _WIDTH)
    with Progress(*columns, console=console, auto_refresh=False, disable=not shown) as progress:
        yield Bar(progress, text, total)
