"""What a comparison measures, and how it becomes JSON and comes back."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opacus_bpclip.bench.settings import Case, Point, base_of


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

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


def median_of(spread: Spread | None) -> float | None:
    """Return a spread's median, if there is a spread."""
    return None if spread is None else spread.median


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
    seconds: tuple[float, ...] = ()
    peaks: tuple[int, ...] | None = ()
    failure: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All arms of one point.

    Args:
        point: what was compared.
        parameters: trainable scalars of the model.
        arms: in the settings' order.
    """

    point: Point
    parameters: int
    arms: tuple[ArmResult, ...]

    def arm(self, name: str) -> ArmResult | None:
        """Return an arm's result; None if it was not measured or does not run."""
        return next((own for own in self.arms if own.arm == name and own.failure is None), None)

    def time_ratio(self, name: str, to: str | None = None) -> Spread | None:
        """Return the ratios of an arm's steps to another's of the same rounds.

        Args:
            name: of the arm.
            to: the other arm; None stands for the arm's base.
        """
        own, other = self.arm(name), self.arm(base_of(name) if to is None else to)
        if own is None or other is None:
            return None
        return Spread.of([a / b for a, b in zip(own.seconds, other.seconds, strict=True)])

    def memory_ratio(self, name: str, to: str | None = None) -> Spread | None:
        """Return the ratios of an arm's peaks to the median of another's.

        Args:
            name: of the arm.
            to: the other arm; None stands for the arm's base.
        """
        own, other = self.arm(name), self.arm(base_of(name) if to is None else to)
        if own is None or other is None or not own.peaks or not other.peaks:
            return None
        base = statistics.median(other.peaks)
        return Spread.of([peak / base for peak in own.peaks])

    def best_of(self, names: Iterable[str], *, memory: bool = False) -> str | None:
        """Return which of some arms has the smallest median ratio; None if none of them runs."""
        ratio = self.memory_ratio if memory else self.time_ratio
        found = {name: spread.median for name in names if (spread := ratio(name)) is not None}
        return min(found, key=lambda name: found[name]) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Return every fact, as JSON knows them; times to four digits."""
        return {
            "name": self.point.name,
            "axis": self.point.axis,
            "case": asdict(self.point.case),
            "parameters": self.parameters,
            "arms": {
                own.arm: {
                    "seconds": [float(f"{value:.4g}") for value in own.seconds],
                    "peak_memory_bytes": None if own.peaks is None else list(own.peaks),
                    "failure": own.failure,
                }
                for own in self.arms
            },
        }


def comparison_from_dict(record: Mapping[str, Any]) -> Comparison:
    """Return the comparison that `Comparison.as_dict` wrote.

    Raises:
        KeyError, TypeError: the record has another shape.
    """
    return Comparison(
        Point(record["name"], record["axis"], Case(**record["case"])),
        record["parameters"],
        tuple(_arm_from_dict(name, own) for name, own in record["arms"].items()),
    )


def _arm_from_dict(name: str, record: Mapping[str, Any]) -> ArmResult:
    peaks = record["peak_memory_bytes"]
    return ArmResult(
        name,
        tuple(record["seconds"]),
        None if peaks is None else tuple(peaks),
        record["failure"],
    )
