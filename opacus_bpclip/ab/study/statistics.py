"""What several seeds tell: a mean, its spread, and a paired difference with its confidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The mean of paired differences, and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


def deviation(values: list[float]) -> float | None:
    """Return the standard deviation of a sample; None for one value."""
    return stdev(values) if len(values) > 1 else None


def paired_difference(
    own: Mapping[int, float], other: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Return how far one arm is above another at the seeds that both have.

    The interval is Student's, for differences that are normal and independent.

    Args:
        own: values by seed.
        other: of the other arm.
        confidence: that the interval holds the true mean.

    Returns:
        None for fewer than two common seeds.

    Example:
        >>> found = paired_difference({0: 2.0, 1: 4.0, 2: 3.0}, {0: 1.0, 1: 2.0, 2: 0.0})
        >>> [round(each, 3) for each in found]
        [2.0, -0.484, 4.484]
    """
    differences = [own[seed] - other[seed] for seed in own if seed in other]
    if len(differences) < 2:
        return None
    count, mean = len(differences), fmean(differences)
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * stdev(differences) / math.sqrt(count)
    return Difference(mean, mean - float(half), mean + float(half))
