"""The results file: written after every arm, read back to resume."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opacus_bpclip.ab.results import ArmResult, Plan, arm_from_dict
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.environment import versions
from opacus_bpclip.jobs.records import as_read, reading, require_same, write_record

# 2: the arm backprop has a joint budget, and clips inputs only where it is told to.
FORMAT = 2
_PACKAGES = ("torch", "opacus", "opacus-bpclip", "numpy", "torchvision", "scikit-learn")

# Where the data lies and which arms are wanted may change between a run and its continuation.
_FREE_TO_CHANGE = ("data_root", "arms")


@dataclass(frozen=True)
class Record:
    """A comparison as far as it has come: ``arms`` holds the finished ones, in order."""

    settings: Settings
    plan: Plan
    arms: tuple[ArmResult, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every arm of the settings is finished."""
        return {result.arm for result in self.arms} >= set(self.settings.arms)

    def arm(self, name: str) -> ArmResult | None:
        """Return a finished arm's result, or None."""
        return next((result for result in self.arms if result.arm == name), None)

    def with_arm(self, result: ArmResult) -> Record:
        """Return a record with one more finished arm."""
        return Record(self.settings, self.plan, (*self.arms, result))

    def as_dict(self) -> dict[str, Any]:
        """Return every fact of the comparison, as JSON knows them."""
        private = {"delta": self.settings.delta, "noise_multiplier": self.plan.noise_multiplier}
        public = dict.fromkeys(private)
        return {
            "format": FORMAT,
            "complete": self.is_complete,
            "settings": asdict(self.settings),
            "plan": asdict(self.plan),
            "versions": versions(*_PACKAGES),
            "platform": platform.platform(),
            "arms": {
                result.arm: {
                    **result.as_dict(),
                    **(public if result.epsilon is None else private),
                    "max_input_norm": self.settings.input_norm(result.arm),
                }
                for result in self.arms
            },
        }


def write(record: Record, path: Path) -> None:
    """Write a record to a file, whole or not at all where the file is an ordinary one."""
    write_record(path, record.as_dict())


def resumed(record: Record, path: Path) -> Record:
    """Return a record with the arms that a file of the same settings holds already.

    Args:
        record: without arms.
        path: a results file; one that does not exist holds no arms.

    Raises:
        UsageError: the file is not a results file, or was measured with other settings, other
            versions or on another platform.
    """
    if not path.exists():
        return record
    refusal = f"cannot resume from {path}"
    with reading(path, "ab", f"{refusal}: it") as held:
        # Alone: between formats the settings' names differ, too.
        require_same([("format", held["format"], FORMAT)], refusal)
        require_same(_decisive(held, as_read(record.as_dict())), refusal)
        arms = tuple(arm_from_dict(name, arm) for name, arm in held["arms"].items())
    return Record(record.settings, record.plan, arms)


def _decisive(held: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for part in ("settings", "versions"):
        for name in sorted(set(now[part]) | set(held[part])):
            if name not in _FREE_TO_CHANGE:
                yield name, held[part].get(name), now[part].get(name)
    yield "platform", held["platform"], now["platform"]
