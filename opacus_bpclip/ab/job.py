"""The whole comparison: check everything, plan, train arm after arm, keep what is finished."""

from __future__ import annotations

from typing import Protocol

import torch
from opacus.data_loader import DPDataLoader
from torch.utils.data import DataLoader

from opacus_bpclip.ab import record as records
from opacus_bpclip.ab.child import train_arm_in_child
from opacus_bpclip.ab.data import Data, load
from opacus_bpclip.ab.models import build, count_parameters
from opacus_bpclip.ab.privacy import epsilon_spent, noise_multiplier_for
from opacus_bpclip.ab.record import Record
from opacus_bpclip.ab.results import ArmResult, Plan
from opacus_bpclip.ab.settings import Output, Settings
from opacus_bpclip.jobs.errors import UsageError
from opacus_bpclip.jobs.extras import require, require_device
from opacus_bpclip.jobs.files import check_plot, check_writable
from opacus_bpclip.jobs.records import require_resumable


class ArmTrainer(Protocol):
    """What trains one arm; the tests put an in-process one in place of a child process."""

    def __call__(
        self, name: str, settings: Settings, plan: Plan, *, progress: bool = ...
    ) -> ArmResult:
        """Train an arm for each seed."""


def compare(
    settings: Settings, output: Output, *, train: ArmTrainer = train_arm_in_child
) -> Record:
    """Run a comparison; ``output.json`` is written after every finished arm.

    Args:
        settings: what to measure.
        output: where to write; the plot is left to the caller.
        train: trains one arm.

    Raises:
        UsageError: something is wrong that was found before anything trained.
        ArmError: an arm failed; those before it are in ``output.json``.
    """
    check(settings, output)
    torch.set_num_threads(settings.threads)
    record = Record(settings, plan_for(settings, load(settings.dataset, settings.data_root)))
    if output.resume and output.json:
        record = records.resumed(record, output.json)
    for name in settings.arms:
        if record.arm(name) is None:
            record = record.with_arm(train(name, settings, record.plan, progress=output.progress))
            _keep(record, output)
    _keep(record, output)
    return record


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


def check(settings: Settings, output: Output) -> None:
    """Find what would otherwise fail only after training.

    Raises:
        UsageError: a package or the device is missing, or a file cannot be written.
    """
    require_device(settings.device)
    if output.progress:
        require("tqdm", "a progress bar (or else --no-progress)")
    require_resumable(output.resume, output.json)
    check_plot(output.plot, "a plot (or else --plot none)")
    check_writable(plot=output.plot, json=output.json)


def _keep(record: Record, output: Output) -> None:
    if output.json:
        records.write(record, output.json)
