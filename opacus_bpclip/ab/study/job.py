"""A whole study: check everything, tune on held-out examples, then train what is published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import random_split

from opacus_bpclip.ab import trial
from opacus_bpclip.ab.job import plan_for
from opacus_bpclip.ab.results import Plan, SeedResult
from opacus_bpclip.ab.study.plot import draw
from opacus_bpclip.ab.study.report import in_short, render
from opacus_bpclip.ab.study.results import Run, RunResult, StudyRecord
from opacus_bpclip.ab.study.runs import RunSettings
from opacus_bpclip.ab.study.settings import Study
from opacus_bpclip.ab.task import Task, task_of
from opacus_bpclip.ab.training import train_seed
from opacus_bpclip.jobs.environment import hardware
from opacus_bpclip.jobs.errors import JobError, in_one_line
from opacus_bpclip.jobs.extras import require_device
from opacus_bpclip.jobs.processes import call_in_children
from opacus_bpclip.jobs.running import Job, View

# Of the split into training and held-out examples, which is the same for all arms and trials.
_SPLIT_SEED = 0
# What tells only how far training comes, and not whether an arm can be trained.
_NOT_OF_PROBLEMS = {"lr", "seeds", "held_out", "epochs", "weight_averaging"}
# What changes neither the number of steps nor the noise multiplier.
_NOT_OF_PLANS = {
    *("arms", "seeds", "threads", "physical_batch_size", "precision", "weight_averaging"),
    *("optimizer", "lr", "momentum", "schedule"),
    *("transform", "views"),
    *("max_grad_norm", "max_input_norm", "bound", "allocation", "normalize", "options"),
}


class StudyJob(Job[StudyRecord]):
    """Runs of one thread, several at the same time.

    Args:
        study: what to measure.
        processes: how many runs at the same time.
    """

    view = View("Study of clipping methods", render, draw, in_short)

    def __init__(self, study: Study, *, processes: int) -> None:
        self._study, self._processes = study, processes
        self._plans: dict[str, Plan] = {}
        self._problems: dict[str, str] = {}

    def check(self) -> None:
        """Try each cell's data, model, loss and metric without privacy."""
        arm = next(iter(self._study.arms))
        for cell in self._study.cells:
            settings = self._study.published(cell, arm, {})[0]
            require_device(settings.device)
            trial.check(_task(settings), settings)

    def begin(self) -> StudyRecord:
        """Return a record without results."""
        return StudyRecord.new(self._study)

    def todo(self, record: StudyRecord) -> Sequence[Run]:
        """Return the runs that are not there, or could not be trained before."""
        found = [(run, record.result(run.settings.identity)) for run in record.runs]
        return [run for run, result in found if result is None or result.note]

    def measure(self, record: StudyRecord, todo: Sequence[Run]) -> Iterator[RunResult]:
        """Measure the trials, and then, with what they choose, what is published."""
        for are_trials in (True, False):
            runs = [run for run in self.todo(record) if bool(run.settings.held_out) == are_trials]
            for result in self._results(runs):
                record = record.with_result(result)
                yield result

    def status(self, record: StudyRecord) -> int:
        """Return 1 if a run failed in training."""
        return int(any(result.failed for result in record.asked))

    def _results(self, runs: Sequence[Run]) -> Iterator[RunResult]:
        calls: list[tuple[Run, Plan]] = []
        for run in runs:
            plan = self._plan(run.settings)
            problem = self._problem(run, plan)
            if problem:
                yield _result(run, plan, note=problem)
            else:
                calls.append((run, plan))
        if calls:
            processes = min(self._processes, len(calls))
            yield from call_in_children(train, calls, processes=processes)

    def _plan(self, settings: RunSettings) -> Plan:
        key = _key(settings, _NOT_OF_PLANS) + str(settings.is_private)
        if key not in self._plans:
            self._plans[key] = plan_for(settings, _task(settings))
        return self._plans[key]

    def _problem(self, run: Run, plan: Plan) -> str:
        settings = run.settings
        key = _key(settings, _NOT_OF_PROBLEMS)
        if key not in self._problems:
            self._problems[key] = trial.problem_of(settings.arm, settings, plan, _task(settings))
        return self._problems[key]


def train(run: Run, plan: Plan) -> RunResult:
    """Train once; what goes wrong becomes a note.

    Args:
        run: a trial is judged by examples that it does not train on, others by the test set.
        plan: of the run's settings.

    Raises:
        JobError: the accountant was not charged once for every step.
    """
    settings = run.settings
    torch.set_num_threads(settings.threads)
    try:
        found = train_seed(settings.arm, settings.seed, settings, plan, _task(settings), False)
    except JobError:
        raise
    except Exception as error:
        return _result(run, plan, note=in_one_line(error), failed=True)
    return _result(run, plan, run=_last_epoch(found) if settings.held_out else found)


def _key(settings: RunSettings, irrelevant: set[str]) -> str:
    return settings.model_dump_json(exclude=irrelevant)


def _last_epoch(found: SeedResult) -> SeedResult:
    return replace(found, epochs=found.epochs[-1:], seconds=found.seconds[-1:])


def _result(asked: Run, plan: Plan, **what: Any) -> RunResult:
    return RunResult(**asked._asdict(), plan=plan, hardware=hardware(asked.settings.device), **what)


def _task(settings: RunSettings) -> Task:
    task = task_of(settings)
    if not settings.held_out:
        return task
    parts = [1 - settings.held_out, settings.held_out]
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    train, held_out = random_split(task.train, parts, generator=generator)
    return replace(task, train=train, test=held_out)
