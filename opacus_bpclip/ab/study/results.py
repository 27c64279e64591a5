"""What a study has found: one line of JSON for each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import ClassVar, Literal, NamedTuple

from typing_extensions import Self

from opacus_bpclip.ab.results import Plan, SeedResult
from opacus_bpclip.ab.study.runs import RunSettings
from opacus_bpclip.ab.study.settings import Study, Table
from opacus_bpclip.jobs.files import write_whole
from opacus_bpclip.jobs.record import UNKNOWN_COMMIT, MeasuredWith, Record, Result


class RunResult(Result, MeasuredWith):
    """One training run, or why there is none.

    Args:
        format: of the line.
        cell: the study's name of it.
        arm: the study's name of it.
        settings: of the run.
        plan: what the arms of the cell share, at these settings.
        run: what was measured; of a trial its last epoch only. None where nothing was.
        note: why nothing was, in one line.
        failed: whether that was found in training, and not when the arm was tried before.
    """

    format: Literal[3] = 3
    cell: str
    arm: str
    settings: RunSettings
    plan: Plan
    run: SeedResult | None = None
    note: str = ""
    failed: bool = False

    @property
    def key(self) -> str:
        """All settings of the run: a study that changes them asks for another run."""
        return self.settings.identity

    @property
    def loss(self) -> float:
        """The final metric where smaller is better, its negative otherwise; infinite for none."""
        if self.run is None or math.isnan(self.run.metric):
            return math.inf
        return -self.run.metric if self.plan.measure.higher_is_better else self.run.metric


class Run(NamedTuple):
    """A run that a study asks for."""

    cell: str
    arm: str
    settings: RunSettings


class StudyRecord(Record[Study, RunResult]):
    """A study as far as it has come; its file is one line for each run, which says all of it."""

    command: ClassVar = "ab --study"
    # Each run's own settings tell it from the others, and each line says where it was measured.
    free: ClassVar = frozenset({*Study.model_fields, "commit", "platform", "hardware"})

    def write(self, path: Path) -> None:
        """Write all lines, or none."""
        write_whole(path, "".join(f"{result.model_dump_json()}\n" for result in self.results))

    @classmethod
    def _of_text(cls, text: str) -> Self:
        results = tuple(map(RunResult.model_validate_json, text.splitlines()))
        if not results:
            return cls.new(Study())
        first = results[0]
        for each in results:
            if each.versions != first.versions:
                raise ValueError("its runs are of several versions")
        return cls(
            settings=Study(),
            commit=", ".join(dict.fromkeys(each.commit or UNKNOWN_COMMIT for each in results)),
            platform=", ".join(dict.fromkeys(each.platform for each in results)),
            hardware=", ".join(dict.fromkeys(each.hardware for each in results)),
            versions=first.versions,
            results=results,
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that are published."""
        return self.settings.seeds

    @property
    def runs(self) -> list[Run]:
        """All runs, the trials first; those that wait for a choice have the file's settings."""
        study = self.settings
        found = [
            Run(cell, arm, settings)
            for cell, arm in study.pairs
            for _, trial in study.trials(cell, arm)
            for settings in trial
        ]
        found += [
            Run(cell, arm, settings)
            for cell, arm in study.pairs
            for settings in study.published(cell, arm, self.chosen(cell, arm) or {})
        ]
        return list({run.settings.identity: run for run in found}.values())

    @property
    def wanted(self) -> Sequence[str]:
        """The keys of all runs."""
        return [run.settings.identity for run in self.runs]

    def chosen(self, cell: str, arm: str) -> Table | None:
        """Return the settings whose trials were best on the mean; None before all are done.

        Of several that are, the first one in the order of the file is chosen.
        """
        losses: list[float] = []
        points: list[Table] = []
        for point, trial in self.settings.trials(cell, arm):
            results = [self.result(settings.identity) for settings in trial]
            found = [result.loss for result in results if result]
            if len(found) < len(trial):
                return None
            points.append(point)
            losses.append(fmean(found))
        return points[losses.index(min(losses))] if points else {}

    def published(self, cell: str, arm: str) -> list[RunResult]:
        """Return an arm's results on the test set, as far as they are there."""
        chosen = self.chosen(cell, arm)
        if chosen is None:
            return []
        runs = self.settings.published(cell, arm, chosen)
        return [found for run in runs if (found := self.result(run.identity))]
