"""One arm, trained once for each seed, in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip.ab.arms import Arm, prepare
from opacus_bpclip.ab.data import Data
from opacus_bpclip.ab.models import build
from opacus_bpclip.ab.privacy import domain_warning_silenced
from opacus_bpclip.ab.results import ArmResult, EpochResult, Plan, SeedResult
from opacus_bpclip.ab.settings import Arm as ArmName
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.errors import JobError
from opacus_bpclip.jobs.memory import PeakMemory
from opacus_bpclip.jobs.progress import Bar, progress_bar
from opacus_bpclip.jobs.quiet import known_warnings_silenced

# The first steps of a run allocate, compile and page in; they are not what a step costs.
WARM_UP_STEPS = 5

_EVALUATION_BATCH = 1000


def train_arm(
    name: ArmName, settings: Settings, plan: Plan, data: Data, *, progress: bool = False
) -> ArmResult:
    """Train an arm once for each seed.

    Args:
        name: one of the settings' arms.
        settings: shared by all arms.
        plan: shared by all arms.
        data: the training and the test set.
        progress: show a bar for each seed on stderr.

    Raises:
        JobError: the arm's accountant was charged otherwise than once for every step.
    """
    torch.set_num_threads(settings.threads)
    _load_libraries(settings, data)
    seeds = [train_seed(name, seed, settings, plan, data, progress) for seed in settings.seeds]
    return ArmResult(arm=name, max_input_norm=settings.input_norm(name), seeds=tuple(seeds))


@known_warnings_silenced()
def train_seed(
    name: str, seed: int, settings: Settings, plan: Plan, data: Data, progress: bool
) -> SeedResult:
    """Train an arm once; the seed decides its weights, its batches and its noise."""
    device = torch.device(settings.device)
    arm = _start(name, seed, settings, plan, data)
    memory = PeakMemory(device)
    seconds: list[float] = []
    epochs: list[EpochResult] = []
    steps = settings.epochs * plan.steps_per_epoch
    with progress_bar(f"{name}, seed {seed}", steps, shown=progress) as bar:
        for epoch in range(settings.epochs):
            with memory.watch():
                loss = _train_epoch(arm, device, seconds, bar)
            epochs.append(
                EpochResult(
                    epoch=epoch + 1,
                    epsilon=plan.epsilons[epoch] if arm.engine else None,
                    accuracy=accuracy(arm.model, data.test, device),
                    loss=loss if math.isfinite(loss) else None,
                )
            )
            _show(bar, epochs[-1])
    return SeedResult(
        seed=seed,
        epochs=tuple(epochs),
        epsilon=_epsilon(arm, settings, plan),
        seconds_per_step=median(seconds[WARM_UP_STEPS:] or seconds),
        peak_memory_bytes=memory.bytes,
    )


def accuracy(model: nn.Module, test: TensorDataset, device: torch.device) -> float:
    """Return the share of a test set that a model classifies rightly."""
    was_training = model.training
    model.eval()
    right = 0
    with torch.no_grad():
        for images, labels in DataLoader(test, batch_size=_EVALUATION_BATCH):
            right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    model.train(was_training)
    return right / len(test)


def _load_libraries(settings: Settings, data: Data) -> None:
    """Make torch load what any training needs, which would else count as the arm's own memory."""
    model = build(settings.dataset).to(settings.device)
    images, labels = data.train[:2]
    F.cross_entropy(model(images.to(settings.device)), labels.to(settings.device)).backward()


def _start(name: str, seed: int, settings: Settings, plan: Plan, data: Data) -> Arm:
    # Three streams of one seed: the same numbers must not both pick examples and make noise.
    streams = np.random.SeedSequence(seed).generate_state(3).tolist()
    torch.manual_seed(streams[0])
    model = build(settings.dataset).to(settings.device)
    loader = DataLoader(
        data.train,
        batch_size=settings.batch_size,
        generator=torch.Generator().manual_seed(streams[1]),
    )
    noise = torch.Generator(settings.device).manual_seed(streams[2])
    return prepare(name, model, loader, settings, plan.noise_multiplier, noise)


def _train_epoch(arm: Arm, device: torch.device, seconds: list[float], bar: Bar) -> float:
    """Train for an epoch, append each step's time, and return the mean loss of its examples."""
    total, examples = 0.0, 0
    for images, labels in arm.loader:
        if arm.engine or len(labels):
            images, labels = images.to(device), labels.to(device)
            with _timed(seconds, device):
                loss = _step(arm, images, labels)
            if len(labels):
                total += loss.item() * len(labels)
                examples += len(labels)
        bar.advance()
    return total / examples if examples else float("nan")


def _step(arm: Arm, images: Tensor, labels: Tensor) -> Tensor:
    arm.optimizer.zero_grad()
    low = arm.precision == "bfloat16"
    with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
        loss: Tensor = arm.criterion(arm.model(images), labels)
    loss.backward()
    arm.optimizer.step()
    return loss.detach()


@contextmanager
def _timed(seconds: list[float], device: torch.device) -> Iterator[None]:
    _wait_for(device)
    start = time.perf_counter()
    yield
    _wait_for(device)
    seconds.append(time.perf_counter() - start)


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


def _show(bar: Bar, epoch: EpochResult) -> None:
    shown = {"loss": "not finite" if epoch.loss is None else f"{epoch.loss:.3f}"}
    shown["accuracy"] = f"{epoch.accuracy:.1%}"
    if epoch.epsilon is not None:
        shown["epsilon"] = f"{epoch.epsilon:.3f}"
    bar.tell(**shown)
