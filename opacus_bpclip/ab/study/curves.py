"""An arm's way through training: what the metric was, and what it had cost, after each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from opacus_bpclip.ab.study.results import RunResult


class Point(NamedTuple):
    """The end of an epoch, over the seeds.

    Args:
        epsilon: spent so far; None without privacy.
        seconds: of all training steps so far, the mean.
        low: smallest metric.
        mean: of the metrics.
        high: largest metric.
    """

    epsilon: float | None
    seconds: float
    low: float
    mean: float
    high: float


def curve(results: Sequence[RunResult]) -> list[Point]:
    """Return the epochs of an arm's runs, in order; results without a run do not count."""
    runs = [result.run for result in results if result.run]
    seconds = zip(*(run.seconds for run in runs), strict=True)
    epochs = zip(*(run.epochs for run in runs), strict=True)
    points = []
    for spent, ends in zip(seconds, epochs, strict=True):
        metrics = [end.metric for end in ends]
        means = fmean(spent), fmean(metrics)
        points.append(Point(ends[0].epsilon, means[0], min(metrics), means[1], max(metrics)))
    return points


def shortest_training(curves: Mapping[str, Sequence[Point]]) -> float | None:
    """Return the seconds of the private arm that is done first; None without private arms."""
    ends = [points[-1] for points in curves.values() if points]
    return min((end.seconds for end in ends if end.epsilon is not None), default=None)


def metric_within(points: Sequence[Point], seconds: float | None) -> float | None:
    """Return the metric of the last epoch that ended in time; None if there is none."""
    done = [point.mean for point in points if seconds is not None and point.seconds <= seconds]
    return done[-1] if done else None
