"""What a measurement was taken with."""

from __future__ import annotations

import importlib.metadata
import platform


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found
