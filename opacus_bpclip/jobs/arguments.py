"""The commands' options: every kind of value, and every option they share, declared once."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_command(
    subparsers: _SubParsersAction[Any],
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
) -> argparse.ArgumentParser:
    """Add a subcommand whose options, where they are not given, stay out of the namespace.

    Their defaults are then the settings' own, which one place knows.

    Args:
        subparsers: of the command line.
        name: of the subcommand.
        run: called with the namespace; returns the exit status.
        summary: its line in the list of subcommands.
        description: its help, in lines that are kept.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(run=run)
    return parser


class Options:
    """A group of a command's options.

    Every method takes the option and its help; ``more`` goes to argparse as it is.

    Args:
        parser: of the command.
        title: of the group.
    """

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._add = parser.add_argument_group(title).add_argument

    def text(self, option: str, about: str, metavar: str = "NAME", **more: Any) -> None:
        """Add an option with one text."""
        self._add(option, metavar=metavar, help=about, **more)

    def integer(self, option: str, about: str, **more: Any) -> None:
        """Add an option with one whole number."""
        self._add(option, type=int, metavar="N", help=about, **more)

    def number(self, option: str, about: str, metavar: str = "X", **more: Any) -> None:
        """Add an option with one number."""
        self._add(option, type=float, metavar=metavar, help=about, **more)

    def number_or_none(self, option: str, about: str) -> None:
        """Add an option with one number, or the word none."""
        self._add(option, type=_number_or_none, metavar="X", help=about)

    def file(self, option: str, about: str) -> None:
        """Add an option with one path."""
        self._add(option, type=Path, metavar="FILE", help=about)

    def file_or_none(self, option: str, about: str, default: str) -> None:
        """Add an option with one path, or the word none against its default."""
        self._add(option, type=_path_or_none, default=Path(default), metavar="FILE", help=about)

    def several(self, option: str, about: str, metavar: str = "NAME", **more: Any) -> None:
        """Add an option with one value or more."""
        self._add(option, nargs="+", action=_StoreTuple, metavar=metavar, help=about, **more)

    def flag(self, option: str, about: str) -> None:
        """Add an option without a value."""
        self._add(option, action="store_true", help=about)

    def json(self, unit: str) -> None:
        """Add ``--json``; ``unit`` is what the file is written after."""
        self.file("--json", f"write all facts here, after every {unit}")

    def resume(self, kept: str) -> None:
        """Add ``--resume``; ``kept`` is what of the file is not done again."""
        self.flag("--resume", f"keep {kept} the --json file holds already")

    def no_progress(self, about: str) -> None:
        """Add ``--no-progress``."""
        self._add("--no-progress", dest="progress", action="store_false", default=True, help=about)


class _StoreTuple(argparse.Action):
    """Store the values as a tuple: settings are immutable."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))


def _number_or_none(text: str) -> float | None:
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or none, not {text!r}") from None


def _path_or_none(text: str) -> Path | None:
    return None if text == "none" else Path(text)
