"""A progress line on stderr while the trial runs of a model take time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Seconds until the first line, and between two updates.
PATIENCE = 2.0


class _Progress:
    """Counts trial runs, and prints the count from time to time."""

    def __init__(self) -> None:
        self.runs = 0
        self.said = False
        self._start = self._last = time.monotonic()

    def note(self) -> None:
        """Count a run that begins."""
        self.runs += 1
        if time.monotonic() - self._last > PATIENCE:
            self.say()

    def say(self, end: str = "") -> None:
        """Print the count, over the line printed before."""
        self.said, self._last = True, time.monotonic()
        seconds = self._last - self._start
        print(
            f"\ropacus-bpclip: trying the model out on made-up examples: {self.runs} runs, "
            f"{seconds:.0f} s",
            end=end,
            file=sys.stderr,
            flush=True,
        )


_at_hand: ContextVar[_Progress | None] = ContextVar("progress", default=None)


@contextmanager
def shown() -> Iterator[None]:
    """Print the progress of the trial runs inside, if they take longer than `PATIENCE`."""
    if _at_hand.get() is not None:
        yield
        return
    progress = _Progress()
    token = _at_hand.set(progress)
    try:
        yield
    finally:
        _at_hand.reset(token)
        if progress.said:
            progress.say(end="\n")


def note_run() -> None:
    """Count a trial run that begins."""
    progress = _at_hand.get()
    if progress is not None:
        progress.note()
