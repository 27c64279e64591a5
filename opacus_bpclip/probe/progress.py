"""A line on stderr where trying a model out takes longer than a moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Seconds without a word, at first and between two lines.
PATIENCE = 2.0


class _Progress:
    """Counts trial runs, and says so from time to time."""

    def __init__(self) -> None:
        self.runs = 0
        self.said = False
        self._start = self._last = time.monotonic()

    def note(self) -> None:
        """Note that a run begins."""
        self.runs += 1
        if time.monotonic() - self._last > PATIENCE:
            self.say()

    def say(self, end: str = "") -> None:
        """Say how far it is, in the place of what was said before."""
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
    """Say how far a search is, if it takes longer than `PATIENCE`."""
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
    """Note that a trial run begins."""
    progress = _at_hand.get()
    if progress is not None:
        progress.note()
