"""The whole comparison: check everything, plan, train arm after arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from opacus.data_loader import DPDataLoader

from opacus_bpclip.ab import trial
from opacus_bpclip.ab.models import count_parameters
from opacus_bpclip.ab.plot import draw
from opacus_bpclip.ab.privacy import epsilon_spent, noise_multiplier_for
from opacus_bpclip.ab.report import in_short, render
from opacus_bpclip.ab.results import ArmResult, ComparisonRecord, Plan
from opacus_bpclip.ab.settings import NON_PRIVATE, Arm, Settings
from opacus_bpclip.ab.task import Task, task_of
from opacus_bpclip.ab.training import train_arm
from opacus_bpclip.jobs.errors import ChildError, JobError, UsageError, in_one_line
from opacus_bpclip.jobs.extras import require_device
from opacus_bpclip.jobs.processes import call_in_child
from opacus_bpclip.jobs.running import Job, View


class Comparison(Job[ComparisonRecord]):
    """Several arms, each in a process of its own, so that its peak memory is nobody else's.

    Args:
        settings: what to measure.
        progress: show a bar for each seed on stderr.
        objects: of `task_of`: what may not be importable; then all arms train in this process.
    """

    view = View("Comparison of clipping methods", render, draw, in_short)

    def __init__(
        self,
        settings: Settings,
        *,
        progress: bool = False,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        self._settings, self._progress, self._objects = settings, progress, objects

    @cached_property
    def _task(self) -> Task:
        return task_of(self._settings, self._objects)

    def check(self) -> None:
        """Find out whether the device is there, and try what the user brings without privacy."""
        require_device(self._settings.device)
        trial.check(self._task, self._settings)

    def begin(self) -> ComparisonRecord:
        """Plan what the arms share."""
        settings = self._settings
        torch.set_num_threads(settings.threads)
        plan = plan_for(settings, self._task)
        return ComparisonRecord.new(settings, settings.device, plan=plan)

    def todo(self, record: ComparisonRecord) -> Sequence[Arm]:
        """Return the arms to train: those, too, that could not be trained before."""
        found = {arm: record.result(arm) for arm in self._settings.arms}
        return [arm for arm, result in found.items() if result is None or result.note]

    def measure(self, record: ComparisonRecord, todo: Sequence[Arm]) -> Iterator[ArmResult]:
        """Try all arms, then train one after the other; one that fails leaves a note.

        Raises:
            UsageError: no private arm can train the model.
        """
        problems = {arm: self._problem(arm, record.plan) for arm in todo}
        self._require_an_arm(problems)
        for arm, problem in problems.items():
            if problem:
                yield self._untrained(arm, note=problem)
        for arm, problem in problems.items():
            if not problem:
                try:
                    yield self._trained(arm, record.plan)
                except ChildError as error:
                    yield self._untrained(arm, note=str(error), failed=True)

    def status(self, record: ComparisonRecord) -> int:
        """Return 1 if an arm failed in training."""
        return int(any(result.failed for result in record.asked))

    def _problem(self, arm: Arm, plan: Plan) -> str:
        return trial.problem_of(arm, self._settings, plan, self._task)

    def _require_an_arm(self, problems: Mapping[Arm, str]) -> None:
        private = [arm for arm in self._settings.arms if arm != NON_PRIVATE]
        if not private or not all(problems.get(arm) for arm in private):
            return
        by_problem: dict[str, list[str]] = {}
        for arm in private:
            by_problem.setdefault(problems[arm], []).append(arm)
        lines = [f"\n- {', '.join(arms)}: {problem}" for problem, arms in by_problem.items()]
        model, _ = self._settings.factories
        raise UsageError(f"no private arm can train {model}:{''.join(lines)}")

    def _untrained(self, arm: Arm, **why: Any) -> ArmResult:
        return ArmResult(arm=arm, max_input_norm=self._settings.input_norm(arm), seeds=(), **why)

    def _trained(self, arm: Arm, plan: Plan) -> ArmResult:
        if self._objects is None:
            return call_in_child(_train, arm, self._settings, plan, self._progress)
        try:
            result = train_arm(arm, self._settings, plan, self._task, progress=self._progress)
            return result.without_memory() if self._settings.device == "cpu" else result
        except JobError:
            raise
        except Exception as error:
            raise ChildError(in_one_line(error)) from error


def plan_for(settings: Settings, task: Task) -> Plan:
    """Compute what all arms share: the batches' law, the noise and its price.

    Raises:
        UsageError: the batch is larger than the training set, or no noise reaches the target.
    """
    examples = len(task.train)
    if settings.batch_size > examples:
        raise UsageError(
            f"--batch-size {settings.batch_size} is larger than the training set of "
            f"{settings.data or settings.title} ({examples} examples)"
        )
    # The loader has the last word on the number of steps, and Opacus's engine asks it as well.
    loader = DPDataLoader.from_data_loader(task.loader(settings.batch_size))
    steps, sample_rate = len(loader), 1 / len(loader)
    noise_multiplier, epsilons = None, []
    if settings.is_private:
        noise_multiplier = noise_multiplier_for(settings, sample_rate, settings.epochs * steps)
        epsilons = [
            epsilon_spent(settings, noise_multiplier, sample_rate, (epoch + 1) * steps)
            for epoch in range(settings.epochs)
        ]
    return Plan(
        sample_rate=sample_rate,
        steps_per_epoch=steps,
        noise_multiplier=noise_multiplier,
        epsilons=tuple(epsilons),
        parameters=count_parameters(task.model()),
        train_examples=examples,
        test_examples=len(task.test),
        measure=task.measure,
    )


def _train(arm: Arm, settings: Settings, plan: Plan, progress: bool) -> ArmResult:
    return train_arm(arm, settings, plan, task_of(settings), progress=progress)
