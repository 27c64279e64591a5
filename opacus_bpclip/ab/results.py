"""What a comparison measures, and how it becomes JSON and comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any


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


@dataclass(frozen=True)
class ArmResult:
    """All training runs of one arm."""

    arm: str
    seeds: tuple[SeedResult, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Final test accuracy of each seed."""
        return tuple(seed.accuracy for seed in self.seeds)

    @property
    def accuracy_mean(self) -> float:
        """Mean of the final test accuracies."""
        return fmean(self.accuracies)

    @property
    def epsilon(self) -> float | None:
        """Largest epsilon any seed reports; all agree unless an accountant is broken."""
        return max((s.epsilon for s in self.seeds if s.epsilon is not None), default=None)

    @property
    def seconds_per_step(self) -> float:
        """Median over seeds."""
        return median(seed.seconds_per_step for seed in self.seeds)

    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest over seeds; None if unknown for any."""
        peaks = [seed.peak_memory_bytes for seed in self.seeds]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if len(known) == len(peaks) else None

    def as_dict(self) -> dict[str, Any]:
        """Return the summary and every record, as JSON knows them."""
        return {
            "accuracy_mean": self.accuracy_mean,
            "accuracy_min": min(self.accuracies),
            "accuracy_max": max(self.accuracies),
            "epsilon": self.epsilon,
            "seconds_per_step": self.seconds_per_step,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seeds": [{**asdict(seed), "accuracy": seed.accuracy} for seed in self.seeds],
        }


def arm_from_dict(arm: str, record: Mapping[str, Any]) -> ArmResult:
    """Return the result that `ArmResult.as_dict` wrote.

    Raises:
        KeyError, TypeError: the record has another shape.
    """
    return ArmResult(arm, tuple(_seed_from_dict(seed) for seed in record["seeds"]))


def _seed_from_dict(record: Mapping[str, Any]) -> SeedResult:
    return SeedResult(
        seed=record["seed"],
        epochs=tuple(EpochResult(**epoch) for epoch in record["epochs"]),
        epsilon=record["epsilon"],
        seconds_per_step=record["seconds_per_step"],
        peak_memory_bytes=record["peak_memory_bytes"],
    )


def finite_or_none(value: float) -> float | None:
    """Return a number that JSON can hold."""
    return value if math.isfinite(value) else None
