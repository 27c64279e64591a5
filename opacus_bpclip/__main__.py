"""The command line ``opacus-bpclip``, also as ``python -m opacus_bpclip``.

What takes time is imported inside of functions, so that Ctrl-C meanwhile ends in one line, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opacus_bpclip.jobs.interrupts import INTERRUPTED, TEXT

if TYPE_CHECKING:
    from cyclopts import App


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if all went well, 2 for wrong usage, 1 for a failure while running, 130
        after Ctrl-C, and what else a command's help names.
    """
    try:
        return _answer(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        sys.stderr.write(TEXT)
        return INTERRUPTED


def program() -> App:
    """Return the commands as one program."""
    from importlib.metadata import version

    from cyclopts import App, Parameter

    from opacus_bpclip.ab.command import ab
    from opacus_bpclip.audit.command import audit
    from opacus_bpclip.bench.command import bench
    from opacus_bpclip.inspection.command import inspect
    from opacus_bpclip.jobs.values import shown

    app = App(
        name="opacus-bpclip",
        help="Backpropagation clipping for Opacus: tools around the library.",
        version=version("opacus-bpclip"),
        help_format="markdown",
        suppress_keyboard_interrupt=False,
        default_parameter=Parameter(
            consume_multiple=True, negative_iterable=(), show_default=shown
        ),
    )
    for command in (ab, audit, bench, inspect):
        app.command(command)
    app.register_install_completion_command()
    return app


def _answer(words: list[str]) -> int:
    """Do what a command line asks for; an error is one line on stderr."""
    import re

    from cyclopts import CycloptsError
    from pydantic import ValidationError

    from opacus_bpclip.jobs.errors import JobError, UsageError, what_is_wrong

    app = program()
    name = " ".join(["opacus-bpclip", *app.parse_commands(words)[0]])
    try:
        if not words:
            raise UsageError("name a command (see opacus-bpclip --help)")
        status = app(words, exit_on_error=False, print_error=False, result_action="return_value")
        return status or 0
    except CycloptsError as error:
        cause = error.__cause__
        text = what_is_wrong(cause) if isinstance(cause, ValidationError) else str(error)
        print(f"{name}: error: {' '.join(text.split())} (see {name} --help)", file=sys.stderr)
        return UsageError.exit_status
    except (JobError, OSError) as error:
        # One line, but for a list: it keeps a line for each item.
        text = re.sub(r"\s*\n(?!- )\s*", " ", str(error).strip())
        print(f"{name}: error: {text}", file=sys.stderr)
        return error.exit_status if isinstance(error, JobError) else JobError.exit_status


if __name__ == "__main__":
    sys.exit(main())
