"""Layers that are given the same input share what is measured of it: query, key and value do."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class SharedMeasurement(Generic[T]):
    """The latest measurement of an input, for the next layer that is given the very same one."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = _nothing
        self._key: Hashable = None
        self._result: T | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return nothing of what was measured: a copy has seen no input."""
        return vars(SharedMeasurement())

    def of(self, x: Tensor, how: Hashable, forward: int, measure: Callable[[Tensor], T]) -> T:
        """Return ``measure(x)``, from memory if that is what was measured last.

        Args:
            x: the input.
            how: stands for ``measure``.
            forward: the number of the forward pass. Between two of them somebody may fill a
                tensor's memory with another batch, and nothing shows it; within one, a change in
                place shows in the tensor's version.
            measure: called with the input, without its graph.
        """
        key = (how, forward, x._version)
        if self._result is None or self._input() is not x or self._key != key:
            self._result = measure(x.detach())
            self._input, self._key = weakref.ref(x), key
        return self._result


def _nothing() -> None:
    return None
