"""What the values of options must be, in the same words in every command; imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from opacus_bpclip.config import is_positive_number
from opacus_bpclip.jobs.errors import UsageError


def require_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Check that a value is one of those that there are.

    Args:
        option: what the value was given by, to start the error with; likewise below.
        value: what was given.
        choices: in the order of the error's list.

    Raises:
        UsageError: it is none of them.
    """
    if value not in choices:
        raise UsageError(f"{option} must be one of {', '.join(choices)}, not {value!r}")


def require_some(option: str, values: Sequence[object]) -> None:
    """Check that there is at least one value.

    Raises:
        UsageError: there is none.
    """
    if not values:
        raise UsageError(f"{option} must not be empty")


def require_distinct(option: str, values: Sequence[object]) -> None:
    """Check that no value is given twice.

    Raises:
        UsageError: one is.
    """
    if len(set(values)) < len(values):
        raise UsageError(f"{option} must not name anything twice: {' '.join(map(str, values))}")


def require_positive(option: str, value: float | None) -> None:
    """Check that a number is finite and above 0; None, where an option allows it, is no number.

    Raises:
        UsageError: it is not.
    """
    if value is not None and not is_positive_number(value):
        raise UsageError(f"{option} must be a finite number above 0, not {value}")


def require_probability(option: str, value: float) -> None:
    """Check that a number is between 0 and 1, and neither of them.

    Raises:
        UsageError: it is not.
    """
    if not 0 < value < 1:
        raise UsageError(f"{option} must be between 0 and 1, not {value}")


def require_at_least_one(option: str, value: int) -> None:
    """Check that a count is 1 or more.

    Raises:
        UsageError: it is less.
    """
    if value < 1:
        raise UsageError(f"{option} must be at least 1, not {value}")
