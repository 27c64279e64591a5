"""Work in a process of its own, so that its memory and its crashes are nobody else's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from opacus_bpclip.jobs.errors import ChildError, JobError

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
        ChildError: the function raised, or the process died; the text is one line and says how.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, args), daemon=True)
    with _environment(environment or {}):
        process.start()
    # With our end open, the death of the child would leave us waiting for ever.
    sending.close()
    try:
        done, answer = receiving.recv()
        process.join()
    except EOFError:
        process.join()
        done, answer = False, _how_it_died(process.exitcode)
    finally:
        process.kill()
        receiving.close()
    if not done:
        raise ChildError(answer)
    result: Result = answer
    return result


def in_one_line(error: Exception) -> str:
    """Return what went wrong; for an error that is not a message to the user also where."""
    text = " ".join(str(error).split())
    if isinstance(error, JobError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    if frames:
        # The end of the path tells the file; the start tells only whose machine it is.
        file = "/".join(Path(frames[-1].filename).parts[-3:])
        place = f" (raised at {file}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {text}{place}"


def _answer(
    connection: Connection, function: Callable[..., object], args: tuple[object, ...]
) -> None:
    # Ctrl-C reaches the whole process group; the parent answers it and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        connection.send((True, function(*args)))
    except Exception as error:
        connection.send((False, in_one_line(error)))
    finally:
        connection.close()


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = "; the system may be out of memory" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with status {exitcode} and no result"


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
