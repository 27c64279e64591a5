"""The ways in which a model is called: a compiled graph must be of one that ran in eager mode."""

from __future__ import annotations

from typing import Any

from torch import Tensor

OTHER_FORM = (
    "The compiled model was called in a way in which no batch has run before torch.compile (other "
    "arguments, flags or numbers of axes): what it does then with its parameters was never "
    "checked. Run one batch of each way of calling it first."
)


def form_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    """Return what tells ways of calling a model apart: as simple as a compiler can trace it."""
    return tuple(map(_kind_of, args)), tuple((name, _kind_of(kwargs[name])) for name in kwargs)


def _kind_of(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dim()
    return value if isinstance(value, (bool, str)) else None
