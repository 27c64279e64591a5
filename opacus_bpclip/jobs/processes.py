"""Work in processes of their own: a crash there ends neither this one nor other work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from opacus_bpclip.jobs.errors import ChildError, JobError, in_one_line
from opacus_bpclip.jobs.interrupts import held_back

Result = TypeVar("Result")


def call_in_child(
    function: Callable[..., Result], *args: Any, environment: Mapping[str, str] | None = None
) -> Result:
    """Call a function in a new process, and wait for its result.

    Args:
        function: of a module's top level; it, its arguments and its result are pickled.
        *args: its arguments.
        environment: variables that the process starts with, in addition to this process's.

    Raises:
        JobError: the function raised it.
        ChildError: the process died, or the function raised another error; the text is one line.
    """
    (result,) = call_in_children(function, [args], processes=1, environment=environment)
    return result


def call_in_children(
    function: Callable[..., Result],
    calls: Iterable[tuple[Any, ...]],
    *,
    processes: int,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Result]:
    """Call a function several times in new processes, and yield each result as soon as it is there.

    Args:
        function: of a module's top level; it, its arguments and its results are pickled.
        calls: the arguments of each call.
        processes: how many run at the same time.
        environment: variables that the processes start with, in addition to this process's.

    Raises:
        JobError, ChildError: a call failed, as in `call_in_child`; the other calls are stopped.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    children: list[BaseProcess] = []
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)
    try:
        with _environment(environment or {}), held_back():
            futures = [pool.submit(_answer, function, args) for args in calls]
            children += set(multiprocessing.active_children()) - others
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        pool.shutdown(wait=True)  # then each child's exit status is known
        raise ChildError(_how_they_died(children)) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # After an error or Ctrl-C, no one needs the results that are still being computed.
        for child in children:
            child.kill()


def _answer(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    try:
        return function(*args)
    except JobError:
        raise
    except Exception as error:
        # The text can always be pickled; the error may hold objects that cannot.
        raise ChildError(in_one_line(error)) from None


def _prepare() -> None:
    """Leave Ctrl-C to the parent process, which it reaches as well, and end when that one ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_they_died(children: Iterable[BaseProcess]) -> str:
    # When one process dies, the pool ends the others by SIGTERM: that is not the cause.
    codes = (child.exitcode for child in children if child.exitcode != -signal.SIGTERM)
    return how_it_died(next(codes, -signal.SIGTERM))


def how_it_died(exitcode: int | None) -> str:
    """Return in words what a process's exit status says."""
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may be out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {exitcode} and no result"


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
