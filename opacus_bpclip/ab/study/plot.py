"""A study as a picture: each cell's metric over the epsilon spent, and over the time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from opacus_bpclip.ab.plot import scaled
from opacus_bpclip.ab.results import Measure
from opacus_bpclip.ab.study.curves import Point, curve
from opacus_bpclip.ab.study.results import RunResult, StudyRecord
from opacus_bpclip.jobs.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    draw_band,
    draw_level,
    new_figure,
    open_frame,
)

_STYLES = (
    *((BLUE, "s", "-"), (ORANGE, "^", "--"), (GREEN, "o", "-"), (PURPLE, "D", "--")),
    *((RED, "v", ":"), (SKY, "P", "-."), (GREY, "X", "--")),
)


def draw(record: StudyRecord, path: Path) -> None:
    """Write the plot of a study, in the format of the path's suffix.

    Each cell is a row: on the left over epsilon, on the right over the seconds of training. Arms
    are curves over their epochs, mean over seeds in a band from the smallest to the largest; an arm
    without privacy is a level on the left.
    """
    cells = list(record.settings.cells)
    figure = new_figure(10.0, 3.6 * len(cells) + 0.8, dpi=120)
    rows = figure.subplots(len(cells), 2, squeeze=False, sharey="row")
    lines: dict[str, Any] = {}
    for cell, axes in zip(cells, rows, strict=True):
        results = [each for arm in record.settings.arms for each in record.published(cell, arm)]
        if results:
            _label(axes, cell, results[0])
        for arm, style in zip(record.settings.arms, cycle(_STYLES), strict=False):
            points = curve(record.published(cell, arm))
            if points:
                lines.setdefault(arm, _draw_arm(axes, points, results[0].plan.measure, style))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _draw_arm(
    axes: Sequence[Any], points: Sequence[Point], measure: Measure, style: tuple[str, str, str]
) -> Any:
    colour, marker, dashes = style
    line: dict[str, Any] = {"colour": colour, "marker": marker, "linestyle": dashes}
    rows = [
        (scaled(measure, point.low), scaled(measure, point.mean), scaled(measure, point.high))
        for point in points
    ]
    if points[-1].epsilon is None:
        draw_level(axes[0], rows[-1][1])
    else:
        draw_band(axes[0], [point.epsilon for point in points], rows, **line)
    return draw_band(axes[1], [point.seconds for point in points], rows, **line)


def _label(axes: Sequence[Any], cell: str, first: RunResult) -> None:
    measure = first.plan.measure
    axes[0].set_title(cell, fontsize=10, loc="left")
    axes[0].set_xlabel(f"epsilon spent (delta = {first.settings.delta:g})")
    axes[0].set_ylabel(f"test {measure.title}{' (%)' if measure.percent else ''}")
    axes[1].set_xlabel("seconds of training")
    for each in axes:
        each.grid(alpha=0.3)
        open_frame(each)
