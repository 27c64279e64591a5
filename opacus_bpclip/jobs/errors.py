"""What ends a command early, and the exit status each cause has."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

# What pydantic says of a wrong value, and how that reads behind an option's name.
_WORDING = (
    (r"^Input should be", "must be"),
    (r", unable to parse .*$", ""),
    (r"^\w+ should have at least 1 item .*$", "must name something"),
)


class JobError(Exception):
    """A command that cannot go on; its text is one message for the user."""

    exit_status: ClassVar[int] = 1


class UsageError(JobError):
    """A setting, a file or a package that is wrong or missing; found before any work."""

    exit_status: ClassVar[int] = 2


class ChildError(JobError):
    """Work that failed in a process of its own."""


def in_one_line(error: Exception) -> str:
    """Return what went wrong; for an error that is not a message to the user also where."""
    text = " ".join(str(error).split())
    if isinstance(error, JobError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    place = ""
    # A syntax error's text names its place; it is raised in the importing code.
    if frames and not isinstance(error, SyntaxError):
        # The end of the path tells the file; the start tells only whose machine it is.
        file = "/".join(Path(frames[-1].filename).parts[-3:])
        place = f" (raised at {file}:{frames[-1].lineno})"
    return f"{type(error).__name__}: {text}{place}"


@contextmanager
def told_of_users_code(subject: str, kind: type[JobError] = UsageError) -> Iterator[None]:
    """Tell in one line what a user's own code raises, which may be anything.

    Args:
        subject: what ran, as the command line names it, to start the error with.
        kind: of the error.

    Raises:
        JobError: of that kind, in place of an exception that is not a message to the user already.
    """
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        raise kind(f"{subject}: {in_one_line(error)}") from error


def what_is_wrong(error: ValidationError) -> str:
    """Return in one line which options have wrong values, and which values they may have."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            continue  # follows from another one
        if not problem["loc"]:
            return in_words(problem)
        option, value = f"--{problem['loc'][0]}".replace("_", "-"), problem["input"]
        given = value if isinstance(value, (list, tuple)) else [value]
        found.setdefault(option, f"{' '.join([option, *map(str, given)])}: {in_words(problem)}")
    return "; ".join(found.values())


def where_and_what(error: ValidationError) -> str:
    """Return the dotted place of a file's first wrong value, and what it must be."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {in_words(first)}" if place else in_words(first)


def in_words(problem: ErrorDetails) -> str:
    """Return what a value must be, without its name."""
    text = str(problem.get("ctx", {}).get("error") or problem["msg"])
    for pydantics, ours in _WORDING:
        text = re.sub(pydantics, ours, text)
    return text
