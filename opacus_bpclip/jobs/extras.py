"""What a comparison uses and may not find: optional packages, and a GPU."""

from __future__ import annotations

from importlib.util import find_spec

import torch

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


def require_device(device: str) -> None:
    """Check that torch finds the device that was asked for.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        UsageError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here")
