"""What a comparison measures."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median
from typing import ClassVar

from pydantic import ConfigDict, computed_field
from pydantic.dataclasses import dataclass

from opacus_bpclip.ab.settings import Arm, Settings
from opacus_bpclip.jobs.record import Record, Result


@dataclass(frozen=True)
class Measure:
    """What the test set is judged by.

    Args:
        name: of the metric.
        higher_is_better: or lower.
        percent: whether it is a share.
    """

    name: str
    higher_is_better: bool = True
    percent: bool = False

    @property
    def title(self) -> str:
        """The name, and what a reader might not expect."""
        return self.name if self.higher_is_better else f"{self.name} (lower is better)"

    def show(self, value: float, digits: int = 2) -> str:
        """Return a value for human eyes.

        Example:
            >>> Measure("accuracy", percent=True).show(0.8875), Measure("loss").show(0.12345)
            ('88.75%', '0.1235')
        """
        return f"{value:.{digits}%}" if self.percent else f"{value:.4g}"


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
        measure: what the test set is judged by.
    """

    sample_rate: float
    steps_per_epoch: int
    noise_multiplier: float | None
    epsilons: tuple[float, ...]
    parameters: int
    train_examples: int
    test_examples: int
    measure: Measure = Measure("accuracy", percent=True)


# A metric may be infinite, or no number.
@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings"))
class EpochResult:
    """One epoch of one run.

    Args:
        epoch: 1 for the first.
        epsilon: spent so far, at the settings' delta; None without privacy.
        metric: of the test set.
        loss: mean training loss over the epoch's examples; None if it was not finite.
    """

    epoch: int
    epsilon: float | None
    metric: float
    loss: float | None


@dataclass(frozen=True, config=ConfigDict(ser_json_inf_nan="strings"))
class SeedResult:
    """One training run.

    Args:
        seed: the settings' seed.
        epochs: one entry for each epoch, in order.
        epsilon: what the engine's accountant reports after training; None without privacy.
        seconds_per_step: median over steps.
        peak_memory_bytes: peak of the training steps over what was held before the first; None
            where the platform does not tell.
        seconds: all training steps took by the end of each epoch; empty in older results.
    """

    seed: int
    epochs: tuple[EpochResult, ...]
    epsilon: float | None
    seconds_per_step: float
    peak_memory_bytes: int | None
    seconds: tuple[float, ...] = ()

    @property
    def metric(self) -> float:
        """The metric after the last epoch."""
        return self.epochs[-1].metric


class ArmResult(Result):
    """All training runs of one arm, or why there are none.

    Args:
        arm: which one.
        max_input_norm: that the arm clipped its layers' inputs to; None where it did not.
        seeds: one run for each; empty where the arm has not trained the model.
        note: why it has not, in one line.
        failed: whether that was found in training, and not when the arm was tried before.
    """

    arm: Arm
    max_input_norm: float | None
    seeds: tuple[SeedResult, ...]
    note: str = ""
    failed: bool = False

    @property
    def key(self) -> str:
        """The arm's name."""
        return self.arm

    @property
    def metrics(self) -> tuple[float, ...]:
        """The metric of each seed after the last epoch."""
        return tuple(seed.metric for seed in self.seeds)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def metric_mean(self) -> float | None:
        """Mean of the final metrics; None where the arm has not trained, as all that follows."""
        return fmean(self.metrics) if self.seeds else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def metric_min(self) -> float | None:
        """Smallest of them."""
        return min(self.metrics, default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def metric_max(self) -> float | None:
        """Largest of them."""
        return max(self.metrics, default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def epsilon(self) -> float | None:
        """Largest epsilon any seed reports; all agree unless an accountant is broken."""
        return max((s.epsilon for s in self.seeds if s.epsilon is not None), default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds_per_step(self) -> float | None:
        """Median over seeds."""
        return median(seed.seconds_per_step for seed in self.seeds) if self.seeds else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_memory_bytes(self) -> int | None:
        """Largest over seeds; None if unknown for any."""
        peaks = [seed.peak_memory_bytes for seed in self.seeds]
        known = [peak for peak in peaks if peak is not None]
        return max(known) if known and len(known) == len(peaks) else None

    def without_memory(self) -> ArmResult:
        """Return the same where a process that had done other work cannot tell the memory."""
        seeds = tuple(replace(seed, peak_memory_bytes=None) for seed in self.seeds)
        return self.model_copy(update={"seeds": seeds})


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
