"""The command line ``opacus-bpclip``, also as ``python -m opacus_bpclip``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

# What a shell reports of a program that Ctrl-C ended.
INTERRUPTED = 130


def program() -> App:
    """Return the commands; they are imported here, so that Ctrl-C meanwhile is answered, too."""
    from opacus_bpclip.ab.command import ab
    from opacus_bpclip.audit.command import audit
    from opacus_bpclip.bench.command import bench
    from opacus_bpclip.inspection.command import inspect
    from opacus_bpclip.jobs.application import application

    return application(ab, audit, bench, inspect)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if all went well, 2 for wrong usage, 1 for a failure while running, 130
        after Ctrl-C, and what else a command's help names.
    """
    try:
        from opacus_bpclip.jobs.application import answer

        return answer(program(), sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("opacus-bpclip: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
