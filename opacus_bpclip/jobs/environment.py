"""What a measurement was taken with."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

_PACKAGES = ("torch", "opacus", "opacus-bpclip", "numpy", "scipy", "scikit-learn", "torchvision")


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of Python and of packages; None for one that is not installed.

    Args:
        *packages: their names; without any, all that may decide results.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages or _PACKAGES:
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found


@cache
def commit() -> str | None:
    """Return the commit that the package runs from, marked if files differ from it.

    ``None`` if the package is installed, and not run from a checkout of its repository.
    """
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head} with changes" if changed else head


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parents[1]), *words]
    # The answer is not worth a long wait.
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def hardware(device: str) -> str:
    """Return in words what ``"cpu"`` or ``"cuda"`` is here."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
