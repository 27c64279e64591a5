"""The kinds of values that options have, checked by pydantic, and their places in the help."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from cyclopts import Group, Parameter
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from opacus_bpclip.jobs.errors import in_words

Item = TypeVar("Item")
Value = TypeVar("Value")

WHAT_TO_MEASURE = Parameter(group=Group("What to measure", sort_key=1))
WHERE_TO_WRITE = Parameter(group=Group("Where to write", sort_key=2))
HOW_TO_RUN = Parameter(group=Group("How to run", sort_key=3))


def shown(default: object) -> str | None:
    """Return how the help shows a default; None if it does not, as for nothing at all."""
    if isinstance(default, tuple):
        return " ".join(map(str, default)) or None
    return None if default is None else str(default)


def _shown_with_none(default: object) -> str | None:
    return "none" if default is None else shown(default)


def _or_none(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    if value is None or value == "none":
        return None
    try:
        return validate(value)
    except ValidationError as error:
        found = dict.fromkeys(map(in_words, error.errors(include_url=False)))
        raise ValueError(f"{' or '.join(found).replace(' or must be', ' or')}, or none") from None


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
Device = Annotated[Literal["cpu", "cuda"], HOW_TO_RUN]
Distinct = Annotated[tuple[Item, ...], AfterValidator(_distinct)]
Several = Annotated[tuple[Item, ...], Field(min_length=1), AfterValidator(_distinct)]
# The word none stands for None on a command line.
OrNone = Annotated[Value | None, WrapValidator(_or_none), Parameter(show_default=_shown_with_none)]
