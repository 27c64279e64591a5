"""What the project holds itself to: the default options, in whole steps on one thread.

Limits are ratios to training the same model without privacy; besides, no mode of Opacus may be
faster or smaller in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opacus_bpclip.bench.results import Comparison, median_of
from opacus_bpclip.bench.settings import DEFAULT, OPACUS


@dataclass(frozen=True)
class Target:
    """Limits for one arm of one case.

    Args:
        arm: the arm.
        time: largest median ratio of a step's time.
        memory: largest ratio of its peak memory; None where there is no limit.
    """

    arm: str
    time: float
    memory: float | None = None


TARGETS = {
    "cnn26k": (Target(DEFAULT, 1.50, 1.50),),
    "resnet18-gn": (Target(DEFAULT, 1.50, 1.30),),
    "transformer": (Target(DEFAULT, 1.27, 1.20), Target(f"{DEFAULT}-compiled", 1.20)),
    "mlp": (Target(DEFAULT, 1.30, 1.10),),
    "transformer-512": (Target(DEFAULT, 1.25),),
}


@dataclass(frozen=True)
class Verdict:
    """One line of the acceptance table.

    Args:
        case: the case's name.
        arm: the arm.
        what: what is measured.
        measured: median; None if it was not measured or does not run.
        limit: the target.
        strict: whether the limit itself is too much.
    """

    case: str
    arm: str
    what: str
    measured: float | None
    limit: float
    strict: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured < self.limit if self.strict else self.measured <= self.limit


def verdicts(comparison: Comparison) -> Iterator[Verdict]:
    """Yield the verdict on each target of a case; none for a growth curve's points."""
    name = comparison.point.name
    if comparison.point.axis is not None:
        return
    for target in TARGETS.get(name, ()):
        time = median_of(comparison.time_ratio(target.arm))
        yield Verdict(name, target.arm, "time", time, target.time)
        if target.memory is not None:
            memory = median_of(comparison.memory_ratio(target.arm))
            yield Verdict(name, target.arm, "memory", memory, target.memory)
    fastest, smallest = rivals(comparison)
    if fastest is not None:
        ratio = median_of(comparison.time_ratio(DEFAULT, to=fastest))
        what = f"time against `{fastest}`, Opacus's fastest mode"
        yield Verdict(name, DEFAULT, what, ratio, 1.0, strict=True)
    if smallest is not None:
        ratio = median_of(comparison.memory_ratio(DEFAULT, to=smallest))
        what = f"memory against `{smallest}`, Opacus's smallest mode"
        yield Verdict(name, DEFAULT, what, ratio, 1.0, strict=True)


def rivals(comparison: Comparison) -> tuple[str | None, str | None]:
    """Return Opacus's fastest and its smallest mode in a comparison; None if none of them runs."""
    return comparison.best_of(OPACUS), comparison.best_of(OPACUS, memory=True)
