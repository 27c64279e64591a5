"""What marks a gradient as a release: it has its noise, and nobody has changed it since."""

from __future__ import annotations

from torch import Tensor


def mark_as_released(gradient: Tensor) -> None:
    """Note that a gradient is released as it is."""
    gradient._released_version = gradient._version  # type: ignore[attr-defined]


def is_released(gradient: Tensor | None) -> bool:
    """Return whether a gradient is the last step's, as it was released."""
    if gradient is None:
        return False
    return getattr(gradient, "_released_version", None) == gradient._version
