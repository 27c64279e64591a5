"""One arm, trained once for each seed, in this process."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from opacus_bpclip.ab.arms import Arm, prepare
from opacus_bpclip.ab.batches import Batch
from opacus_bpclip.ab.metrics import value_of
from opacus_bpclip.ab.privacy import domain_warning_silenced
from opacus_bpclip.ab.results import ArmResult, EpochResult, Measure, Plan, SeedResult
from opacus_bpclip.ab.settings import Arm as ArmName
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.task import Task
from opacus_bpclip.jobs.errors import JobError
from opacus_bpclip.jobs.memory import PeakMemory
from opacus_bpclip.jobs.progress import Bar, progress_bar
from opacus_bpclip.jobs.quiet import known_warnings_silenced

# The first steps of a run allocate, compile and page in; they are not what a step costs.
WARM_UP_STEPS = 5


def train_arm(
    name: ArmName, settings: Settings, plan: Plan, task: Task, *, progress: bool = False
) -> ArmResult:
    """Train an arm once for each seed.

    Args:
        name: one of the settings' arms.
        settings: shared by all arms.
        plan: shared by all arms.
        task: shared by all arms.
        progress: show a bar for each seed on stderr.

    Raises:
        JobError: the arm's accountant was charged otherwise than once for every step.
    """
    torch.set_num_threads(settings.threads)
    _load_libraries(settings, task)
    seeds = [train_seed(name, seed, settings, plan, task, progress) for seed in settings.seeds]
    return ArmResult(arm=name, max_input_norm=settings.input_norm(name), seeds=tuple(seeds))


@known_warnings_silenced()
def train_seed(
    name: str, seed: int, settings: Settings, plan: Plan, task: Task, progress: bool
) -> SeedResult:
    """Train an arm once; the seed decides its weights, its batches and its noise."""
    arm = start(name, seed, settings, plan, task)
    memory = PeakMemory(arm.device)
    seconds: list[float] = []
    epochs: list[EpochResult] = []
    spent: list[float] = []
    steps = settings.epochs * plan.steps_per_epoch
    with progress_bar(f"{name}, seed {seed}", steps, shown=progress) as bar:
        for epoch in range(settings.epochs):
            with memory.watch():
                loss = _train_epoch(arm, seconds, bar)
            spent.append(sum(seconds))
            # Expanded weights evaluate no model that holds per-example gradients.
            arm.optimizer.zero_grad()
            with arm.judged() as model:
                metric = evaluate(model, task, settings)
            epochs.append(
                EpochResult(
                    epoch=epoch + 1,
                    epsilon=plan.epsilons[epoch] if arm.engine else None,
                    metric=metric,
                    loss=loss if math.isfinite(loss) else None,
                )
            )
            _show(bar, epochs[-1], plan.measure)
    return SeedResult(
        seed=seed,
        epochs=tuple(epochs),
        epsilon=_epsilon(arm, settings, plan),
        seconds_per_step=median(seconds[WARM_UP_STEPS:] or seconds),
        peak_memory_bytes=memory.bytes,
        seconds=tuple(spent),
    )


def evaluate(model: nn.Module, task: Task, settings: Settings) -> float:
    """Return the metric of a model on the test set."""
    batches = task.test_batches(settings.physical_batch_size or settings.batch_size)
    return value_of(task.metric, model, batches, torch.device(settings.device))


def start(
    name: str,
    seed: int,
    settings: Settings,
    plan: Plan,
    task: Task,
    *,
    batch_size: int | None = None,
) -> Arm:
    """Return an arm before its first step.

    Args:
        name: one of the settings' arms.
        seed: decides weights, batches and noise.
        settings: shared by all arms.
        plan: shared by all arms.
        task: shared by all arms.
        batch_size: in place of the settings'.
    """
    # Three streams of one seed: the same numbers must not both pick examples and make noise.
    streams = np.random.SeedSequence(seed).generate_state(3).tolist()
    for seed_all in (random.seed, np.random.seed, torch.manual_seed):
        seed_all(streams[0])
    # Opacus refuses a model in evaluation mode, as pretrained ones are, and sees no layer of one
    # inside of a model in training mode.
    model = task.new_model().to(settings.device).train()
    draws = torch.Generator().manual_seed(streams[1])
    loader = task.loader(batch_size or settings.batch_size, generator=draws)
    noise = torch.Generator(settings.device).manual_seed(streams[2])
    return prepare(name, model, loader, task, settings, plan.noise_multiplier, noise)


def step(arm: Arm, batch: Batch) -> Tensor:
    """Take a step, or with privacy the part of one that a physical batch is; return the loss."""
    arm.optimizer.zero_grad()
    if arm.engine or arm.rows is None or not batch.size:
        loss = _backward(arm, batch)
    else:
        parts = [_backward(arm, own, own.size / batch.size) for own in batch.parts(arm.rows)]
        loss = torch.stack(parts).sum()
    arm.optimizer.step()
    return loss


def _backward(arm: Arm, batch: Batch, share: float = 1.0) -> Tensor:
    low = arm.precision == "bfloat16"
    with torch.autocast(arm.device.type, torch.bfloat16, enabled=low):
        loss: Tensor = arm.criterion(batch.outputs_of(arm.model), batch.targets)
    if share < 1:
        loss = loss * share
    loss.backward()
    return loss.detach()


def _load_libraries(settings: Settings, task: Task) -> None:
    """Make torch load what any training needs, which would else count as the arm's own memory."""
    device = torch.device(settings.device)
    batch = Batch.of(next(iter(task.loader(2))), device)
    outputs = batch.outputs_of(task.new_model().to(device))
    task.criterion.to(device)(outputs, batch.targets).backward()


def _train_epoch(arm: Arm, seconds: list[float], bar: Bar) -> float:
    """Train for an epoch, append each step's time, and return the mean loss of its examples."""
    total, examples, spent = 0.0, 0, 0.0
    with arm.batches() as batches:
        for each in batches:
            batch = Batch.of(each, arm.device)
            if arm.engine or batch.size:
                with _timed(arm.device) as taken:
                    loss = step(arm, batch)
                spent += sum(taken)
                if batch.size:
                    total += loss.item() * batch.size
                    examples += batch.size
            if arm.in_step:
                continue
            if spent:
                seconds.append(spent)
                spent = 0.0
            if arm.schedule:
                arm.schedule.step()
            if arm.average:
                arm.average.update()
            bar.advance()
    return total / examples if examples else float("nan")


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Give a list that has the seconds of what is inside when that is done."""
    _wait_for(device)
    start, taken = time.perf_counter(), list[float]()
    yield taken
    _wait_for(device)
    taken.append(time.perf_counter() - start)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _epsilon(arm: Arm, settings: Settings, plan: Plan) -> float | None:
    if arm.engine is None:
        return None
    steps = settings.epochs * plan.steps_per_epoch
    expected = [(plan.noise_multiplier, plan.sample_rate, steps)]
    charged = arm.engine.accountant.history
    if charged != expected:
        raise JobError(
            "the accountant was charged (noise multiplier, sample rate, steps) "
            f"{charged} where training took {expected}"
        )
    with domain_warning_silenced(settings.accountant):
        return float(arm.engine.get_epsilon(settings.delta))


def _show(bar: Bar, epoch: EpochResult, measure: Measure) -> None:
    shown = {"loss": "not finite" if epoch.loss is None else f"{epoch.loss:.3f}"}
    shown[measure.name] = measure.show(epoch.metric, digits=1)
    if epoch.epsilon is not None:
        shown["epsilon"] = f"{epoch.epsilon:.3f}"
    bar.tell(**shown)
