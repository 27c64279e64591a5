"""Share the measurement of an input between the layers that get it, such as query, key, value."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

T = TypeVar("T")


class SharedMeasurement(Generic[T]):
    """The latest measurement of an input, for the next layer that gets the same tensor."""

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = _nothing
        self._key: Hashable = None
        self._result: T | None = None

    def __getstate__(self) -> dict[str, object]:
        """Return an empty state: a copy starts without a measurement."""
        return vars(SharedMeasurement())

    def of(self, x: Tensor, how: Hashable, forward: int, measure: Callable[[Tensor], T]) -> T:
        """Return ``measure(x)``, or the last result if it was computed from the same values.

        Args:
            x: the input.
            how: identifies ``measure``.
            forward: the number of the forward pass. Between two forward passes the memory of a
                tensor may be filled with another batch without a change of its version. Within one
                forward pass, the version shows changes in place.
            measure: called with the detached input.
        """
        key = (how, forward, x._version)
        if self._result is None or self._input() is not x or self._key != key:
            self._result = measure(x.detach())
            self._input, self._key = weakref.ref(x), key
        return self._result


def _nothing() -> None:
    return None
