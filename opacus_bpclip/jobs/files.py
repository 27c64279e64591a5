"""Results files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from opacus_bpclip.jobs.errors import UsageError


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all where it is an ordinary one."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def check_writable(option: str, path: Path) -> None:
    """Try to write: permissions alone do not tell of full disks, read-only mounts and folders.

    Args:
        option: what the file was given by, to start the error with.
        path: an ordinary file is left as it is, and an absent one absent.

    Raises:
        UsageError: the file cannot be written.
    """
    existed = path.exists()
    try:
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror}") from error
    if (path.is_file() or not existed) and not os.access(path.parent, os.W_OK):
        raise UsageError(f"{option} {path} cannot be written: its folder is read-only")


def check_plot_format(path: Path) -> None:
    """Check that matplotlib, which must be installed, can write a plot of this name.

    Raises:
        UsageError: it cannot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known: Callable[[], dict[str, str]] = FigureCanvasAgg.get_supported_filetypes
    if path.suffix.lower().lstrip(".") not in known():
        raise UsageError(f"--plot {path}: name a file that ends in .png, .pdf or .svg")
