"""Tables for human eyes."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows with the first column set left and the others right.

    Example:
        >>> print(aligned([["arm", "accuracy"], ["backprop", "97 %"]]))
        arm       accuracy
        backprop      97 %
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return the same rows as a table in Markdown; the first one is its header.

    Example:
        >>> print(markdown([["arm", "accuracy"], ["backprop", "97 %"]]))
        | arm | accuracy |
        |---|---|
        | backprop | 97 % |
    """
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, f"|{'---|' * len(rows[0])}", *body])
