"""The optional packages that a comparison uses."""

from __future__ import annotations

from importlib.util import find_spec

from opacus_bpclip.jobs.errors import UsageError


def require(module: str, purpose: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        module: its top-level import name.
        purpose: what needs it, to start the error with.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec(module) is None:
        raise UsageError(
            f'{purpose} needs {module}, which is not installed: pip install "opacus-bpclip[ab]"'
        )
