"""Peak memory of a stretch of training, above what was held before it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class PeakMemory:
    """Measure the peak over watched stretches, relative to the moment of construction.

    On a GPU it is torch's allocated memory, on a CPU the process's resident set. On Linux that
    comes from ``/proc``, where the mark can be reset, and not from ``getrusage``, whose maximum a
    spawned process inherits from its parent.

    Args:
        device: where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak: int | None = None
        self._reset()
        self._base = self._high_water_mark()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the memory used inside."""
        self._reset()
        yield
        mark = self._high_water_mark()
        if mark is not None:
            self._peak = max(mark, self._peak or 0)

    @property
    def bytes(self) -> int | None:
        """The largest growth seen so far, at least 0; None where the platform does not tell."""
        if self._base is None or self._peak is None:
            return None
        return max(0, self._peak - self._base)

    def _reset(self) -> None:
        """Lower the mark to what is held now, where that can be done."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif _PROC.exists():
            with suppress(OSError):
                (_PROC / "clear_refs").write_text("5")

    def _high_water_mark(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        with suppress(OSError):
            for line in (_PROC / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return _maximum_resident_set()


def _maximum_resident_set() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024
