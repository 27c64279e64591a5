"""The results of a whole audit: a verdict for each target."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import SerializerFunctionWrapHandler, model_serializer

from opacus_bpclip.audit.settings import Settings, Task, tasks
from opacus_bpclip.audit.verdict import Verdict
from opacus_bpclip.jobs.record import Record, Result


class Audited(Result):
    """One target and what its audit came to."""

    task: Task
    verdict: Verdict

    @property
    def key(self) -> Task:
        """The task."""
        return self.task

    @model_serializer(mode="wrap")
    def _with_summary(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write what follows from the verdict beside it, for readers of the file."""
        names = ("outcome", "violations", "doubts")
        return {**handler(self), **{name: getattr(self.verdict, name) for name in names}}


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
