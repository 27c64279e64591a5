"""What a comparison measures."""

from __future__ import annotations

from statistics import fmean, median
from typing import ClassVar

from pydantic import computed_field
from pydantic.dataclasses import dataclass

from opacus_bpclip.ab.settings import Arm, Settings
from opacus_bpclip.jobs.record import Record, Result


@dataclass(frozen=True)
class Plan:
    """What every arm shares beyond the settings; computed once, before anything trains.

    Args:
        sample_rate: chance of each example to enter a batch.
        steps_per_epoch: Poisson batches in an epoch.
        noise_multiplier: standard deviation of the noise over the sensitivity; None if no arm is
            private.
        epsilons: epsilon spent after each epoch; empty if no arm is private.
        parameters: trainable scalars of the model.
        train_examples: size of the training set.
        test_examples: size of the test set.
    """

    sample_rate: float
    steps_per_epoch: int
    noise_multiplier: float | None
    epsilons: tuple[float, ...]
    parameters: int
    train_examples: int
    test_examples: int


@dataclass(frozen=True)
class EpochResult:
    """One epoch of one run.

    Args:
        epoch: 1 for the first.
        epsilon: spent so far, at the settings' delta; None without privacy.
        accuracy: share of the test set classified rightly.
        loss: mean training loss over the epoch's examples; None if it was not finite.
    """

    epoch: int
    epsilon: float | None
    accuracy: float
    loss: float | None


@dataclass(frozen=True)
class SeedResult:
    """One training run.

    Args:
        seed: the settings' seed.
        epochs: one entry for each epoch, in order.
        epsilon: what the engine's accountant reports after training; None without privacy.
        seconds_per_step: median over steps.
        peak_memory_bytes: peak of the training steps over what was held before the first; None
            where the platform does not tell.
    """

    seed: int
    epochs: tuple[EpochResult, ...]
    epsilon: float | None
    seconds_per_step: float
    peak_memory_bytes: int | None

    @property
    def accuracy(self) -> float:
        """Test accuracy after the last epoch."""
        return self.epochs[-1].accuracy


class ArmResult(Result):
    """All training runs of one arm.

    Args:
        arm: which one.
        max_input_norm: that the arm clipped its layers' inputs to; None where it did not.
        seeds: one run for each.
    """

    arm: Arm
    max_input_norm: float | None
    seeds: tuple[SeedResult, ...]

    @property
    def key(self) -> str:
        """The arm's name."""
        return self.arm

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Final test accuracy of each seed."""
        return tuple(seed.accuracy for seed in self.seeds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_mean(self) -> float:
        """Mean of the final test accuracies."""
        return fmean(self.accuracies)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_min(self) -> float:
        """Smallest of them."""
        return min(self.accuracies)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accuracy_max(self) -> float:
        """Largest of them."""
        return max(self.accuracies)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def epsilon(self) -> float | None:
        """Largest epsilon any seed reports; all agree unless an accountant is broken."""
        return max((s.epsilon for s in self.seeds if s.epsilon is not None), default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds_per_step(self) -> float:
        """Median over seeds."""
        return median(seed.seconds_per_step for seed in self.seeds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest over seeds; None if unknown for any."""
        peaks = [seed.peak_memory_bytes for seed in self.seeds]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if len(known) == len(peaks) else None


class ComparisonRecord(Record[Settings, ArmResult]):
    """A comparison as far as it has come.

    Args:
        plan: what its arms share.
    """

    command: ClassVar = "ab"
    free: ClassVar = frozenset({"data_root", "arms", "commit", "hardware"})

    plan: Plan

    @property
    def wanted(self) -> tuple[str, ...]:
        """The arms asked for."""
        return self.settings.arms

    @property
    def seeds(self) -> tuple[int, ...]:
        """One for each run of an arm."""
        return self.settings.seeds
