"""The results file of an audit: written after every target, read back to resume."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opacus_bpclip.audit.settings import Settings, Task
from opacus_bpclip.audit.verdict import Verdict, verdict_from_dict
from opacus_bpclip.jobs.environment import commit, versions
from opacus_bpclip.jobs.records import as_read, reading, require_same, write_record

FORMAT = 2
_PACKAGES = ("torch", "opacus", "opacus-bpclip", "numpy", "scipy")

# Which targets are wanted may change between an audit and its continuation.
_FREE_TO_CHANGE = (
    "cases",
    "allocations",
    "bounds",
    "loss_reductions",
    "full",
    "target",
    "model",
)


@dataclass(frozen=True)
class Record:
    """An audit as far as it has come: ``verdicts`` holds the finished ones, by task."""

    settings: Settings
    tasks: tuple[Task, ...]
    verdicts: tuple[tuple[Task, Verdict], ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every target is finished."""
        return all(self.verdict(task) is not None for task in self.tasks)

    @property
    def in_order(self) -> list[tuple[Task, Verdict]]:
        """Return what is finished, in the order of the tasks."""
        return sorted(self.verdicts, key=lambda pair: self.tasks.index(pair[0]))

    def verdict(self, task: Task) -> Verdict | None:
        """Return a finished task's verdict, or None."""
        return next((verdict for own, verdict in self.verdicts if own == task), None)

    def with_verdict(self, task: Task, verdict: Verdict) -> Record:
        """Return a record with one more finished task."""
        return Record(self.settings, self.tasks, (*self.verdicts, (task, verdict)))

    def as_dict(self) -> dict[str, Any]:
        """Return every fact, as JSON knows them."""
        return {
            "format": FORMAT,
            "complete": self.is_complete,
            "settings": asdict(self.settings),
            "commit": commit(),
            "versions": versions(*_PACKAGES),
            "platform": platform.platform(),
            "verdicts": [
                {"task": asdict(task), **verdict.as_dict()} for task, verdict in self.in_order
            ],
        }


def keep(record: Record, path: Path | None) -> None:
    """Write a record to a file, if there is one to write to."""
    if path:
        write_record(path, record.as_dict())


def resumed(record: Record, path: Path) -> Record:
    """Return a record with the verdicts that a file of the same settings holds already.

    Args:
        record: without verdicts.
        path: a results file; one that does not exist holds none.

    Raises:
        UsageError: the file is not a results file, or comes from other settings, another commit or
            other versions.
    """
    if not path.exists():
        return record
    refusal = f"cannot resume from {path}"
    with reading(path, "audit", f"{refusal}: it") as held:
        decisive = list(_decisive(held, as_read(record.as_dict())))
        verdicts = [(Task(**found["task"]), verdict_from_dict(found)) for found in held["verdicts"]]
    require_same(decisive, refusal)
    wanted = tuple(pair for pair in verdicts if pair[0] in record.tasks)
    return Record(record.settings, record.tasks, wanted)


def _decisive(held: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in ("format", "commit", "platform"):
        yield name, held[name], now[name]
    for part in ("settings", "versions"):
        for name, value in now[part].items():
            if name not in _FREE_TO_CHANGE:
                yield name, held[part].get(name), value
