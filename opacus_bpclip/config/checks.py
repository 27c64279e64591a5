"""Checks of options: each raises an error that names the option and the accepted values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value", int, float)


def is_positive_number(value: object) -> bool:
    """Return whether ``value`` is a finite number above zero; a bool does not count as one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return 0 < float(value) < math.inf
    except OverflowError:  # an integer beyond any float
        return False


class Frozen(Mapping[str, Value]):
    """A mapping that cannot be changed, so that it can be hashed, copied and pickled."""

    def __init__(self, items: Mapping[str, Value]) -> None:
        self._items: tuple[tuple[str, Value], ...] = tuple(items.items())

    def __getitem__(self, name: str) -> Value:
        return dict(self._items)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return repr(dict(self._items))


def require_positive(options: object, names: Iterable[str]) -> None:
    """Check that options are finite numbers above zero.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        value = getattr(options, name)
        if not is_positive_number(value):
            raise ValueError(f"Expected {name}={value!r} to be a finite number > 0.")


def require_choice(name: str, value: object, choices: tuple[str, ...], more: str = "") -> None:
    """Check that an option is one of the choices.

    Args:
        name: the option's name.
        value: its value.
        choices: the accepted values.
        more: what else is accepted, for the message.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"Expected {name}={value!r} to be one of {expected} {more}".rstrip() + ".")
