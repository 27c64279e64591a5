"""What Ctrl-C does: it ends a command with one line, whenever it comes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130
TEXT = "opacus-bpclip: interrupted\n"


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process on Ctrl-C, without an exception, which torch's import answers by a crash."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        os.write(2, TEXT.encode())
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def held_back() -> Iterator[None]:
    """Deliver Ctrl-C only afterwards; a process that is started meanwhile never sees it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
