"""The whole comparison: check everything, plan, train arm after arm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader

from opacus_bpclip.ab.data import Data, load
from opacus_bpclip.ab.models import build, count_parameters
from opacus_bpclip.ab.plot import draw, legend
from opacus_bpclip.ab.privacy import epsilon_spent, noise_multiplier_for
from opacus_bpclip.ab.report import render
from opacus_bpclip.ab.results import ArmResult, ComparisonRecord, Plan
from opacus_bpclip.ab.settings import Arm, Settings
from opacus_bpclip.ab.training import train_arm
from opacus_bpclip.jobs.errors import ChildError, JobError, UsageError
from opacus_bpclip.jobs.extras import require_device
from opacus_bpclip.jobs.processes import call_in_child
from opacus_bpclip.jobs.running import Job, View


class Comparison(Job[ComparisonRecord]):
    """Several arms, each in a process of its own, so that its peak memory is nobody else's.

    Args:
        settings: what to measure.
        progress: show a bar for each seed on stderr.
    """

    view = View("Comparison of clipping methods", render, draw, legend)

    def __init__(self, settings: Settings, *, progress: bool = False) -> None:
        self._settings, self._progress = settings, progress

    def check(self) -> None:
        """Find out whether the device is there."""
        require_device(self._settings.device)

    def begin(self) -> ComparisonRecord:
        """Plan what the arms share."""
        settings = self._settings
        torch.set_num_threads(settings.threads)
        plan = plan_for(settings, load(settings.dataset, settings.data_root))
        return ComparisonRecord.new(settings, settings.device, plan=plan)

    def measure(self, record: ComparisonRecord, todo: Sequence[Arm]) -> Iterator[ArmResult]:
        """Train arm after arm."""
        for arm in todo:
            try:
                yield call_in_child(_train, arm, self._settings, record.plan, self._progress)
            except ChildError as error:
                raise JobError(f"the arm {arm} failed: {error}") from error


def plan_for(settings: Settings, data: Data) -> Plan:
    """Compute what all arms share: the batches' law, the noise and its price.

    Raises:
        UsageError: the batch is larger than the training set, or no noise reaches the target.
    """
    examples = len(data.train)
    if settings.batch_size > examples:
        raise UsageError(
            f"--batch-size {settings.batch_size} is larger than the training set of "
            f"{settings.title} ({examples} examples)"
        )
    # The loader has the last word on the number of steps, and Opacus's engine asks it as well.
    loader = DPDataLoader.from_data_loader(DataLoader(data.train, settings.batch_size))
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
        parameters=count_parameters(build(settings.dataset)),
        train_examples=examples,
        test_examples=len(data.test),
    )


def _train(arm: Arm, settings: Settings, plan: Plan, progress: bool) -> ArmResult:
    data = load(settings.dataset, settings.data_root)
    return train_arm(arm, settings, plan, data, progress=progress)
