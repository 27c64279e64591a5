"""The results of a whole audit: a verdict for each target."""

from __future__ import annotations

from typing import ClassVar

from pydantic import computed_field

from opacus_bpclip.audit.settings import Settings, Task, tasks
from opacus_bpclip.audit.verdict import Outcome, Verdict
from opacus_bpclip.jobs.record import Record, Result


class Audited(Result):
    """One target and what its audit came to."""

    task: Task
    verdict: Verdict

    @property
    def key(self) -> Task:
        """The task."""
        return self.task

    @computed_field  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Outcome:
        """The verdict's outcome."""
        return self.verdict.outcome

    @computed_field  # type: ignore[prop-decorator]
    @property
    def violations(self) -> tuple[str, ...]:
        """What breaks the claim."""
        return self.verdict.violations

    @computed_field  # type: ignore[prop-decorator]
    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a pass would mean little."""
        return self.verdict.doubts


class AuditRecord(Record[Settings, Audited]):
    """An audit as far as it has come."""

    command: ClassVar = "audit"
    free: ClassVar = frozenset(
        {"case", "allocation", "bound", "loss_reduction", "full", "target", "model", "hardware"}
    )

    @property
    def wanted(self) -> tuple[Task, ...]:
        """The targets asked for."""
        return tuple(tasks(self.settings))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The one that every target's own is made of."""
        return (self.settings.seed,)
