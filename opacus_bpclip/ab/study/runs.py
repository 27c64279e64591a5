"""The settings of one training run of a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import Field, model_validator
from typing_extensions import Self

from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.loading import load_object
from opacus_bpclip.jobs.values import Count


class RunSettings(Settings):
    """The settings of a comparison with one arm and one seed, and what only a study sets.

    Args:
        options: of `BackpropClipping`, by name, in place of what the arm has. ``"none"`` stands
            for None, a table for an object that has options of its own: the first class that they
            fit. ``"module:name"`` stands for a function where one may be given.
        held_out: part of the training set that is left out of training and judged by, in place of
            the test set; 0 for a run that is judged by the test set.
        threads: torch's intra-op threads.
        data_root: folder of the data set's files.

    Raises:
        ValidationError: a value is wrong, or the arm has no such options.
    """

    options: dict[str, Any] = Field(default_factory=dict)
    held_out: float = Field(0.0, ge=0, lt=1)
    threads: Count = 1
    # Where the data lie decides nothing, and is nobody else's business.
    data_root: Path = Field(Path("data"), exclude=True)

    @model_validator(mode="after")
    def _clipping_has_the_options(self) -> Self:
        if self.options and super().backprop(self.arm) is None:
            raise ValueError(f"options: the arm {self.arm} has none of BackpropClipping")
        try:
            self.backprop(self.arm)
        except UsageError as error:
            raise ValueError(f"options: {error}") from None
        except TypeError as error:
            unknown = str(error).rpartition("argument ")[2].strip("'")
            raise ValueError(f"options: BackpropClipping has no {unknown}") from None
        return self

    @property
    def arm(self) -> str:
        """The one arm, by the command's name."""
        return self.arms[0]

    @property
    def seed(self) -> int:
        """The one seed."""
        return self.seeds[0]

    @cached_property
    def identity(self) -> str:
        """What tells the run from all others."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    def backprop(self, arm: str) -> BackpropClipping | None:
        """Return the arm's options of backpropagation clipping; None where it clips otherwise."""
        base = super().backprop(arm)
        given: dict[str, Any] = {name: _made(name, own) for name, own in self.options.items()}
        return replace(base, **given) if base else None


@cache
def _kinds(options: type) -> dict[str, tuple[Any, ...]]:
    """Return what an option may be, by the option."""
    return {name: get_args(hint) for name, hint in get_type_hints(options).items()}


def _made(name: str, value: Any, options: type = BackpropClipping) -> Any:
    if value == "none":
        return None
    kinds = _kinds(options).get(name, ())
    if isinstance(value, str) and any(get_origin(kind) is Callable for kind in kinds):
        return load_object(value)
    for kind in filter(_has_fields, kinds):
        if isinstance(value, dict) and set(value) <= {field.name for field in fields(kind)}:
            return kind(**{inner: _made(inner, own, kind) for inner, own in value.items()})
    return value


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)
