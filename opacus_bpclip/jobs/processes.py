"""Work in processes of its own, so that its memory and its crashes are nobody else's."""

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

Result = TypeVar("Result")


def call_in_child(
    function: Callable[..., Result], *args: Any, environment: Mapping[str, str] | None = None
) -> Result:
    """Call a function in a spawned process, and wait for its result.

    Args:
        function: of a module's top level; it, its arguments and its result are pickled.
        *args: its arguments.
        environment: variables that the process starts with, on top of this one's.

    Raises:
        ChildError: the process died, or the function raised anything but a `JobError`, which comes
            through as it is; the text is one line and says how.
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
    """Call a function several times in spawned processes, and yield each result when it is there.

    Args:
        function: as for `call_in_child`, likewise its errors.
        calls: the arguments of each call.
        processes: how many run at the same time.
        environment: variables that the processes start with, on top of this one's.
    """
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    children: list[BaseProcess] = []
    with _environment(environment or {}):
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)
        futures = [pool.submit(_answer, function, args) for args in calls]
        children += set(multiprocessing.active_children()) - before
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ChildError(_how_they_died(children)) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # After an error or Ctrl-C nobody waits for what they do.
        for child in children:
            child.kill()


def _answer(function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
    try:
        return function(*args)
    except JobError:
        raise
    except Exception as error:
        # What the error holds may not be picklable; its text is.
        raise ChildError(in_one_line(error)) from None


def _prepare() -> None:
    # Ctrl-C reaches the whole process group; the parent answers it and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Die with the process that wants the answer, however that one dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _how_they_died(children: Iterable[BaseProcess]) -> str:
    codes = []
    for child in children:
        child.join()
        codes.append(child.exitcode)
    # The pool ends the others by SIGTERM.
    return how_it_died(next((code for code in codes if code != -signal.SIGTERM), -signal.SIGTERM))


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
