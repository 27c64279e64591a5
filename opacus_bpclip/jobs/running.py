"""A subcommand from its options to its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opacus_bpclip.jobs.errors import JobError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130

Taken = TypeVar("Taken", bound="DataclassInstance")


def run_reported(args: argparse.Namespace, work: Callable[[dict[str, Any]], int]) -> int:
    """Do a subcommand's work, and answer what ends it early by one line on stderr.

    Args:
        args: the parsed command line; ``args.command`` is the subcommand's name.
        work: called with the options that were given; returns the exit status.

    Returns:
        The work's exit status; a `JobError`'s own, that of a failure for an `OSError`, and 130 for
        an interruption.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    try:
        return work(given)
    except (JobError, OSError) as error:
        print(f"opacus-bpclip {args.command}: error: {error}", file=sys.stderr)
        return error.exit_status if isinstance(error, JobError) else JobError.exit_status
    except KeyboardInterrupt:
        print(f"opacus-bpclip {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def take(kind: type[Taken], given: dict[str, Any]) -> Taken:
    """Make a dataclass of the options that are its fields, and leave the others in ``given``.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Output:
        ...     json: str | None = None
        ...     progress: bool = True
        >>> given = {"json": "a.json", "seed": 7}
        >>> take(Output, given), given
        (Output(json='a.json', progress=True), {'seed': 7})
    """
    names = [field.name for field in fields(kind)]
    return kind(**{name: given.pop(name) for name in names if name in given})


def deliver(what: str, path: Path | None, write: Callable[[Path], object] | None = None) -> None:
    """Write a file that was asked for, and say where it is.

    Args:
        what: it is, for human eyes.
        path: None if nobody asked.
        write: called with the path; None if the file was written before.
    """
    if path:
        if write:
            write(path)
        print(f"{what}: {path}")
