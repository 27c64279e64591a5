"""What a comparison measures."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import PlainSerializer
from typing_extensions import Self

from opacus_bpclip.bench.settings import (
    ARMS,
    GROWTHS,
    Arm,
    GrowthName,
    Key,
    Point,
    Settings,
    base_of,
)
from opacus_bpclip.jobs.record import Record, Result

Quantity = Literal["time", "memory"]
# Four digits are more than a clock is good for.
Seconds = Annotated[float, PlainSerializer(lambda seconds: float(f"{seconds:.4g}"))]


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one number.

        Example:
            >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
            Spread(low=2.0, median=3.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class ArmResult:
    """One arm of one comparison.

    Args:
        arm: a name in `settings.ARMS`.
        seconds: of a step, one for each round; empty if the arm does not run.
        peaks: memory of a step in bytes, one for each watched step; None where it is not known,
            empty if the arm does not run.
        failure: why the arm does not run; None if it does.
    """

    arm: str
    seconds: tuple[Seconds, ...] = ()
    peaks: tuple[int, ...] | None = ()
    failure: str | None = None


class Comparison(Result):
    """All arms of one point.

    Args:
        point: what was compared.
        parameters: trainable scalars of the model.
        arms: in the settings' order.
    """

    point: Point
    parameters: int
    arms: tuple[ArmResult, ...]

    @property
    def key(self) -> Key:
        """The point's key."""
        return self.point.key

    def arm(self, name: str) -> ArmResult | None:
        """Return an arm's result; None if it was not measured or does not run."""
        return next((own for own in self.arms if own.arm == name and own.failure is None), None)

    def ratio(self, quantity: Quantity, name: str, to: str | None = None) -> Spread | None:
        """Return the ratios of an arm's steps to another arm's; None if one was not measured.

        Times are compared within a round, peaks with the other arm's median peak.

        Args:
            quantity: what of the steps is compared.
            name: of the arm.
            to: the other arm; None stands for the arm's base.
        """
        own, other = self.arm(name), self.arm(to or base_of(name))
        if own is None or other is None:
            return None
        if quantity == "time":
            return Spread.of([a / b for a, b in zip(own.seconds, other.seconds, strict=True)])
        if not own.peaks or not other.peaks:
            return None
        base = statistics.median(other.peaks)
        return Spread.of([peak / base for peak in own.peaks])

    def median(self, quantity: Quantity, name: str, to: str | None = None) -> float | None:
        """Return the median of the same ratios."""
        spread = self.ratio(quantity, name, to)
        return None if spread is None else spread.median

    def best_of(self, quantity: Quantity, names: Iterable[str]) -> str | None:
        """Return which of some arms has the smallest median ratio; None if none of them runs."""
        found = {own: median for own in names if (median := self.median(quantity, own)) is not None}
        return min(found, key=lambda own: found[own], default=None)


class BenchRecord(Record[Settings, Comparison]):
    """Comparisons that were measured under the same circumstances."""

    command: ClassVar = "bench"
    free: ClassVar = frozenset(
        {"growth", "case", "processes", "commit"}
        | {"numpy", "scipy", "scikit_learn", "torchvision"}
    )
    # What may differ, too, in results that new ones only stand beside.
    free_beside: ClassVar = frozenset({"arms", "rounds", "limit"})

    def differences(self, held: Self, free: Collection[str]) -> list[str]:
        """Return what keeps results out; the arms decide by point, not by what was asked for."""
        found = super().differences(held, {"arms", *free})
        if "arms" in free:
            return found
        now = self.settings.arms
        for comparison in held.results:
            there = [own.arm for own in comparison.arms]
            if comparison.key in self.wanted and not set(now) <= set(there):
                name = " ".join(str(part) for part in comparison.key if part is not None)
                found.append(f"arms of {name} {' '.join(there)} there, {' '.join(now)} now")
        return found

    @property
    def wanted(self) -> list[Key]:
        """What the settings ask for."""
        return [point.key for point in self.settings.points]

    @property
    def seeds(self) -> tuple[int, ...]:
        """That of weights, batches and orders."""
        return (0,)

    @property
    def cases(self) -> list[Comparison]:
        """The comparisons that are not on a growth curve."""
        return [own for own in self.results if own.point.axis is None]

    @property
    def curves(self) -> dict[GrowthName, list[Comparison]]:
        """The growth curves that have a point, by the size that grows."""
        every = {axis: [own for own in self.results if own.point.axis == axis] for axis in GROWTHS}
        return {axis: curve for axis, curve in every.items() if curve}


def compared_arms(comparisons: Iterable[Comparison]) -> list[Arm]:
    """Return the arms of some comparisons in their usual order, without those that are a base."""
    measured = {own.arm for comparison in comparisons for own in comparison.arms}
    return [arm for arm in ARMS if arm in measured and arm != base_of(arm)]
