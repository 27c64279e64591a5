"""The results file of an audit: written after every target, read back to resume."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opacus_bpclip.audit.settings import Settings, Task
from opacus_bpclip.audit.verdict import Verdict, verdict_from_dict
from opacus_bpclip.jobs.environment import commit, versions
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.files import write_whole

FORMAT = 1
_PACKAGES = ("torch", "opacus", "opacus-bpclip", "numpy", "scipy")

# Which targets are wanted may change between an audit and its continuation.
_FREE_TO_CHANGE = ("cases", "bounds", "loss_reductions", "full", "target", "model")


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
        write_whole(path, json.dumps(record.as_dict(), indent=2, allow_nan=False) + "\n")


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
    try:
        held = json.loads(path.read_text())
        differences = _differences(json.loads(json.dumps(record.as_dict())), held)
        verdicts = [(Task(**found["task"]), verdict_from_dict(found)) for found in held["verdicts"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot resume from {path}: it is not a results file of opacus-bpclip audit "
            f"({type(error).__name__}: {error})"
        ) from error
    if differences:
        raise UsageError(f"cannot resume from {path}: {'; '.join(differences)}")
    wanted = tuple(pair for pair in verdicts if pair[0] in record.tasks)
    return Record(record.settings, record.tasks, wanted)


def _differences(now: dict[str, Any], held: dict[str, Any]) -> list[str]:
    pairs = [(name, held[name], now[name]) for name in ("format", "commit", "platform")]
    for part in ("settings", "versions"):
        pairs += [
            (name, held[part].get(name), value)
            for name, value in now[part].items()
            if name not in _FREE_TO_CHANGE
        ]
    return [f"{name} {there} there, {here} now" for name, there, here in pairs if there != here]
