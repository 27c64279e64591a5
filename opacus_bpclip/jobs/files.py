"""Results files: checked before the work, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.extras import require


def write_whole(path: Path, text: str) -> None:
    """Write a file, whole or not at all where it is an ordinary one."""
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def check_writable(files: Mapping[str, Path | None]) -> None:
    """Try to write: permissions alone do not tell of full disks, read-only mounts and folders.

    Args:
        files: by option, in the order to try them; None for one that is not wanted. An ordinary
            file is left as it is, and an absent one absent.

    Raises:
        UsageError: a file cannot be written, or two options name the same one.
    """
    seen: dict[Path, str] = {}
    for option, path in files.items():
        if not path:
            continue
        _try_to_write(option, path)
        # What is no ordinary file, a terminal or a pipe, takes several outputs.
        if path.is_file() or not path.exists():
            other = seen.setdefault(path.resolve(), option)
            if other != option:
                raise UsageError(f"{other} and {option} both name {path}: give each its own file")


def check_plot(path: Path | None) -> None:
    """Check that a plot, if one is wanted, can be drawn in the format of its name.

    Args:
        path: of the plot; None if none is wanted.

    Raises:
        UsageError: matplotlib is not installed, or cannot write such a file.
    """
    if path is None:
        return
    require("matplotlib", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known: Callable[[], dict[str, str]] = FigureCanvasAgg.get_supported_filetypes
    if path.suffix.lower().lstrip(".") not in known():
        raise UsageError(f"--plot {path}: name a file that ends in .png, .pdf or .svg")


def _try_to_write(option: str, path: Path) -> None:
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
