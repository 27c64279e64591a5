"""A study as a picture: each cell's metric over the epsilon spent, and over the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from opacus_bpclip.ab.plot import scaled
from opacus_bpclip.ab.results import Measure
from opacus_bpclip.ab.study.curves import Point, curve
from opacus_bpclip.ab.study.results import RunResult, StudyRecord
from opacus_bpclip.jobs.figures import COLOURS, draw_band, draw_level, new_figure, open_frame

Style = tuple[str, str, Any]
# Each of another length, so that many arms differ in one of them at least.
_MARKERS = ("s", "^", "o", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1)))


def draw(record: StudyRecord, path: Path) -> None:
    """Write the plot of a study, in the format of the path's suffix.

    Each cell is a row: on the left over epsilon, on the right over the seconds of training. Arms
    are curves over their epochs, mean over seeds in a band from the smallest to the largest; an arm
    without privacy is a level on the left. The heights are those of the second half of training.
    """
    cells = list(record.settings.cells)
    figure = new_figure(10.0, 4.0 * len(cells) + 0.8, dpi=120)
    rows = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
    lines: dict[str, Any] = {}
    for cell, axes in zip(cells, rows, strict=True):
        found = {arm: record.published(cell, arm) for arm in record.settings.arms}
        results = [result for own in found.values() for result in own]
        if results:
            lines |= _draw_cell(axes, cell, results[0], found)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path)


def _draw_cell(
    axes: Sequence[Any], cell: str, first: RunResult, found: Mapping[str, Sequence[RunResult]]
) -> dict[str, Any]:
    measure = first.plan.measure
    lines, heights = {}, list[float]()
    styles = zip(cycle(COLOURS), cycle(_MARKERS), cycle(_DASHES), strict=False)
    for (arm, results), style in zip(found.items(), styles, strict=False):
        points = [_scaled(measure, point) for point in curve(results)]
        if points:
            lines[arm] = _draw_arm(axes, points, style)
            heights += [each for point in points[len(points) // 2 :] for each in point[2:]]
    axes[0].set_title(cell, fontsize=10, loc="left")
    axes[0].set_xlabel(f"epsilon spent (delta = {first.settings.delta:g})")
    axes[0].set_ylabel(f"test {measure.title}{' (%)' if measure.percent else ''}")
    axes[1].set_xlabel("seconds of training")
    for each in axes:
        each.grid(alpha=0.3)
        open_frame(each)
    if heights and min(heights) < max(heights):
        margin = 0.03 * (max(heights) - min(heights))  # room for the markers
        axes[0].set_ylim(min(heights) - margin, max(heights) + margin)
    return lines


def _draw_arm(axes: Sequence[Any], points: Sequence[Point], style: Style) -> Any:
    colour, marker, dashes = style
    line: dict[str, Any] = {"colour": colour, "marker": marker, "linestyle": dashes}
    rows = [(point.low, point.mean, point.high) for point in points]
    if points[-1].epsilon is None:
        draw_level(axes[0], points[-1].mean)
    else:
        draw_band(axes[0], [point.epsilon for point in points], rows, **line)
    return draw_band(axes[1], [point.seconds for point in points], rows, **line)


def _scaled(measure: Measure, point: Point) -> Point:
    low, mean, high = (scaled(measure, own) for own in (point.low, point.mean, point.high))
    return point._replace(low=low, mean=mean, high=high)
