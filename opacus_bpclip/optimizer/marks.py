"""The mark of a gradient that was released: it has its noise, and was not changed since."""

from __future__ import annotations

from torch import Tensor


def mark_as_released(gradient: Tensor) -> None:
    """Mark a gradient as released; an in-place change takes the mark away."""
    gradient._released_version = gradient._version  # type: ignore[attr-defined]


def is_released(gradient: Tensor | None) -> bool:
    """Return whether a gradient is one that a step has released, unchanged."""
    if gradient is None:
        return False
    return getattr(gradient, "_released_version", None) == gradient._version
