"""What the project holds itself to, as ratios to training the same model without privacy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from opacus_bpclip.bench.results import Comparison, median_of
from opacus_bpclip.bench.settings import BOUNDS, OPACUS


@dataclass(frozen=True)
class Target:
    """Limits for one arm of one case; None where there is none.

    Args:
        arm: the arm.
        time: largest median ratio of a step's time.
        memory: largest ratio of its peak memory.
    """

    arm: str
    time: float
    memory: float | None


def _eager(fast: float, exact: float, memory: float, exact_memory: float) -> tuple[Target, ...]:
    return (
        Target("product", fast, memory),
        Target("weighted", fast, memory),
        Target("exact", exact, exact_memory),
    )


TARGETS = {
    "cnn26k": _eager(1.10, 1.60, 1.10, 1.30),
    "resnet18-gn": _eager(1.10, 1.60, 1.10, 1.30),
    "transformer": (
        *_eager(1.15, 1.40, 1.10, 1.30),
        Target("product-compiled", 1.10, None),
        Target("weighted-compiled", 1.10, None),
    ),
    "mlp": _eager(1.10, 1.15, 1.10, 1.15),
}
# How many times faster than Opacus's fastest mode `weighted` is to be; the other bounds: faster.
_LEAD = {"cnn26k": 1.8, "transformer": 1.8}
_WEIGHTED_LEAD = 1.3


@dataclass(frozen=True)
class Verdict:
    """One line of the acceptance table.

    Args:
        case: the case's name.
        arm: the arm.
        what: what is measured.
        measured: median; None if it was not measured or does not run.
        limit: the target.
        at_most: whether the limit is an upper one.
    """

    case: str
    arm: str
    what: str
    measured: float | None
    limit: float
    at_most: bool

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def verdicts(comparison: Comparison) -> Iterator[Verdict]:
    """Yield the verdict on each target of a case; none for a growth curve's points."""
    name = comparison.point.name
    if comparison.point.axis is not None:
        return
    for target in TARGETS.get(name, ()):
        time = median_of(comparison.time_ratio(target.arm))
        yield Verdict(name, target.arm, "time", time, target.time, at_most=True)
        if target.memory is not None:
            memory = median_of(comparison.memory_ratio(target.arm))
            yield Verdict(name, target.arm, "memory", memory, target.memory, at_most=True)
    fastest = comparison.best_of(OPACUS)
    smallest = comparison.best_of(OPACUS, memory=True)
    for arm in BOUNDS:
        if fastest is not None:
            lead = median_of(comparison.time_ratio(fastest, to=arm))
            limit = _LEAD.get(name, _WEIGHTED_LEAD) if arm == "weighted" else 1.0
            what = f"time of `{fastest}`, Opacus's fastest mode, over its own"
            yield Verdict(name, arm, what, lead, limit, at_most=False)
        if smallest is not None:
            lead = median_of(comparison.memory_ratio(smallest, to=arm))
            what = f"memory of `{smallest}`, Opacus's smallest mode, over its own"
            yield Verdict(name, arm, what, lead, 1.0, at_most=False)
