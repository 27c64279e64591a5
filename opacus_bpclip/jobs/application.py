"""The commands as one program."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.metadata import version

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError

from opacus_bpclip.jobs.errors import JobError, UsageError, what_is_wrong
from opacus_bpclip.jobs.values import shown


def application(*commands: Callable[..., int]) -> App:
    """Return the program that has these commands, each under its function's name."""
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
    for command in commands:
        app.command(command)
    app.register_install_completion_command()
    return app


def answer(app: App, words: list[str]) -> int:
    """Do what a command line asks for; an error is one line on stderr.

    Args:
        app: from `application`.
        words: of the command line, without the program's name.

    Returns:
        The exit status.
    """
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
