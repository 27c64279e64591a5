"""The kinds of values that options have, checked by pydantic."""

from __future__ import annotations

from typing import Annotated, TypeVar

from cyclopts import Parameter
from pydantic import AfterValidator, BeforeValidator, Field

Item = TypeVar("Item")
Value = TypeVar("Value")


def _none_where_it_says_so(value: object) -> object:
    return None if value == "none" else value


def shown(default: object) -> str | None:
    """Return how the help shows a default; None if it does not, as for nothing at all."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or None
    return None if default is None else str(default)


def _shown_with_none(default: object) -> str | None:
    return "none" if default is None else shown(default)


def _distinct(values: tuple[Item, ...]) -> tuple[Item, ...]:
    if len(set(values)) < len(values):
        raise ValueError("must not name anything twice")
    return values


Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Distinct = Annotated[tuple[Item, ...], AfterValidator(_distinct)]
Several = Annotated[tuple[Item, ...], Field(min_length=1), AfterValidator(_distinct)]
# The word none stands for None on a command line.
OrNone = Annotated[
    Value | None,
    BeforeValidator(_none_where_it_says_so),
    Parameter(show_default=_shown_with_none),
]
