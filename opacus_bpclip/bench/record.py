"""The results file: every comparison measured under the same circumstances."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opacus_bpclip.bench.results import Comparison, comparison_from_dict
from opacus_bpclip.bench.settings import Settings
from opacus_bpclip.jobs.environment import versions
from opacus_bpclip.jobs.files import write_whole
from opacus_bpclip.jobs.records import reading, require_same

FORMAT = 2
_PACKAGES = ("torch", "opacus", "opacus-bpclip")


@dataclass(frozen=True)
class Circumstances:
    """What all comparisons of a record share.

    Args:
        threads: torch's intra-op threads.
        device: ``"cpu"`` or ``"cuda"``.
        hardware: the device, in words.
        platform: the system, in words.
        versions: of the packages that decide the results.
        precision: of the forward pass.
    """

    threads: int
    device: str
    hardware: str
    platform: str
    versions: dict[str, str | None]
    precision: str = "float32"


@dataclass(frozen=True)
class Record:
    """Comparisons, in the order of their first measurement; without any, no circumstances."""

    circumstances: Circumstances | None = None
    comparisons: tuple[Comparison, ...] = ()

    def with_comparison(self, new: Comparison) -> Record:
        """Return a record with one more comparison, in place of an older one of the same point."""
        keys = [own.point.key for own in self.comparisons]
        if new.point.key in keys:
            changed = list(self.comparisons)
            changed[keys.index(new.point.key)] = new
            return replace(self, comparisons=tuple(changed))
        return replace(self, comparisons=(*self.comparisons, new))

    def as_dict(self) -> dict[str, Any]:
        """Return every fact, as JSON knows them."""
        return {
            "format": FORMAT,
            "circumstances": vars(self.circumstances) if self.circumstances else None,
            "comparisons": [own.as_dict() for own in self.comparisons],
        }


def circumstances(settings: Settings) -> Circumstances:
    """Return what measurements with these settings share."""
    return Circumstances(
        threads=settings.threads,
        device=settings.device,
        hardware=_hardware(settings.device),
        platform=platform.platform(),
        versions=versions(*_PACKAGES),
        precision=settings.precision,
    )


def write(record: Record, path: Path) -> None:
    """Write a record to a file, whole or not at all, each list of numbers on one line."""
    text = json.dumps(record.as_dict(), indent=1, allow_nan=False)
    flat = re.sub(r"\[[-+.\de,\s]+\]", lambda found: " ".join(found[0].split()), text)
    write_whole(path, flat + "\n")


def read(path: Path) -> Record:
    """Return the record that a file holds.

    Raises:
        UsageError: the file cannot be read or is not a results file.
    """
    with reading(path, "bench", str(path)) as held:
        if held["format"] != FORMAT:
            raise ValueError(f"format {held['format']}, not {FORMAT}")
        around = held["circumstances"]
        return Record(
            Circumstances(**around) if around else None,
            tuple(comparison_from_dict(own) for own in held["comparisons"]),
        )


def continued(record: Record, now: Circumstances) -> Record:
    """Return a record that measurements under these circumstances can be added to.

    Raises:
        UsageError: its comparisons were measured under others.
    """
    if record.circumstances is not None and record.comparisons:
        before, after = vars(record.circumstances), vars(now)
        decisive = ((name, before[name], after[name]) for name in before)
        require_same(decisive, "cannot add to the results in --from-json")
    return replace(record, circumstances=now)


def _hardware(device: str) -> str:
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
