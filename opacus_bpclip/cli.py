"""The command line ``opacus-bpclip``; what a subcommand does is imported when it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from opacus_bpclip.ab import command as ab
from opacus_bpclip.audit import command as audit
from opacus_bpclip.bench import command as bench
from opacus_bpclip.inspection import command as inspect_command

# A command is a module with add_parser(subparsers), which sets run(args) -> int as a default.
COMMANDS = (ab, audit, bench, inspect_command)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is a --help away."""

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="opacus-bpclip",
        description="Backpropagation clipping for Opacus: tools around the library.",
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {version('opacus-bpclip')}"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 if all went well, 2 for wrong usage, 1 for a failure while running.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        # argparse leaves by itself after --help, --version and errors.
        return stop.code if isinstance(stop.code, int) else 1
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
