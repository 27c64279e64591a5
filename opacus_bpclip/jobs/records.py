"""Results files as JSON: written whole, read with care, continued only where nothing changed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.files import write_whole


def write_record(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts to a file, whole or not at all where the file is an ordinary one."""
    write_whole(path, json.dumps(facts, indent=2, allow_nan=False) + "\n")


def as_read(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as a file would give them back: with lists in place of tuples.

    Example:
        >>> as_read({"seeds": (0, 1)})
        {'seeds': [0, 1]}
    """
    read: dict[str, Any] = json.loads(json.dumps(facts))
    return read


@contextmanager
def reading(path: Path, command: str, subject: str) -> Iterator[Any]:
    """Read a results file, and answer for one of any other shape by one line.

    Args:
        path: of the file.
        command: the subcommand that writes such files.
        subject: what the error starts with, up to "is not a results file".

    Yields:
        What the file holds; whoever takes it apart does so inside.

    Raises:
        UsageError: the file cannot be read, or is not what was expected inside.
    """
    try:
        yield json.loads(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{subject} is not a results file of opacus-bpclip {command} "
            f"({type(error).__name__}: {error})"
        ) from error


def require_same(facts: Iterable[tuple[str, Any, Any]], refusal: str) -> None:
    """Check that results may stand beside those of a file.

    Args:
        facts: of what decides the results, its name, its value in the file, and its value now.
        refusal: what the error starts with.

    Raises:
        UsageError: facts differ; the text names them all.
    """
    differences = [f"{name} {there} there, {now} now" for name, there, now in facts if there != now]
    if differences:
        raise UsageError(f"{refusal}: {'; '.join(differences)}")


def require_resumable(resume: bool, path: Path | None) -> None:
    """Check that there is a file to continue from, if one is to be continued.

    Raises:
        UsageError: none is named.
    """
    if resume and path is None:
        raise UsageError("--resume needs --json FILE, the file to continue from")
