"""Tables, for a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, left: Collection[int] = (0,)) -> str:
    """Return rows, the first of which is the header, in columns of equal width.

    Args:
        rows: of cells.
        left: the columns that are set left; the others are set right.

    Example:
        >>> print(aligned([["arm", "accuracy"], ["backprop", "97 %"]]))
        arm       accuracy
        backprop      97 %
    """
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    for column in range(len(rows[0])):
        table.add_column(justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wide enough for any table: a line that is broken in a file cannot be searched for.
    console = Console(width=10_000, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def markdown(rows: Rows) -> str:
    """Return the same rows as a table in Markdown.

    Example:
        >>> print(markdown([["arm", "accuracy"], ["backprop", "97 %"]]))
        | arm | accuracy |
        |---|---|
        | backprop | 97 % |
    """
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *body])


class Style(NamedTuple):
    """How a report sets its tables and its titles."""

    table: Callable[[Rows], str]
    title: Callable[[str], str]


TERMINAL = Style(aligned, "{}:".format)
PAGE = Style(markdown, "## {}".format)
