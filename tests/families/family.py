"""A model that people train, as they load it, at a tiny size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn


class Family(NamedTuple):
    """One model.

    Attributes:
        name: of the model and its head.
        build: returns the model.
        data: returns a batch of so many examples, tensors by name.
        losses: returns each example's loss.
    """

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[int], dict[str, Tensor]]
    losses: Callable[[nn.Module, Any], Tensor]


FAMILIES: dict[str, Family] = {}


def add(family: Family) -> None:
    """Add a family to those that are tried."""
    FAMILIES[family.name] = family
