"""The steps of a run, in segments: one for each engine, or each call of ``fit`` or ``train``.

A run may branch, and branches may train at the same time. A segment is taken by one alone, so
its steps only grow: of two reports of it, the larger one is right. Steps of different segments
were all taken, and add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from operator import or_

# Steps of one kind: the noise multiplier, the sampling rate and the number of steps.
Steps = tuple[float, float, int]
# The number of steps of each noise multiplier and sampling rate.
Count = Counter[tuple[float, float]]
# The steps of each segment, by its identifier.
Segments = dict[str, Count]


def count(history: Iterable[Sequence[float]]) -> Count:
    """Return how many steps of each kind a history has."""
    counted: Count = Counter()
    for noise_multiplier, sample_rate, steps in history:
        counted[float(noise_multiplier), float(sample_rate)] += int(steps)
    return counted


def history(counted: Count) -> list[Steps]:
    """Return steps in the form in which an accountant keeps them, each kind once."""
    return [(*kind, steps) for kind, steps in counted.items() if steps > 0]


def total(segments: Mapping[str, Count]) -> Count:
    """Return the steps of all segments together."""
    return sum(segments.values(), Counter())


def as_worst(segments: Mapping[str, Count], kinds: Iterable[tuple[float, float]]) -> Segments:
    """Return as many steps, all of one kind that is at least as bad as each of the given kinds."""
    noise_multipliers, sample_rates = zip(*kinds, strict=True)
    worst = min(noise_multipliers), max(sample_rates)
    return {name: Counter({worst: steps.total()}) for name, steps in segments.items()}


def union(reports: Sequence[Mapping[str, Count]]) -> Segments:
    """Return all segments that are in any of the reports, each with the most steps reported."""
    names = dict.fromkeys(name for report in reports for name in report)
    # Of two counts, `or_` takes the larger one of each kind.
    return {name: reduce(or_, (r[name] for r in reports if name in r)) for name in names}
