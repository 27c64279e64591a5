"""The scores of both worlds as histograms, one panel for each statistical audit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from opacus_bpclip.audit.empirical import Empirical
from opacus_bpclip.audit.results import AuditRecord
from opacus_bpclip.jobs.figures import BLUE, GREY, ORANGE, new_figure, open_frame

_COLUMNS = 5


def draw(record: AuditRecord, path: Path) -> None:
    """Write the histograms of all one-step trials, in the format of the path's suffix."""
    panels = [
        (found.verdict.target, found.verdict.empirical[0])
        for found in record.asked
        if found.verdict.empirical
    ]
    columns = min(_COLUMNS, max(len(panels), 1))
    lines = max(math.ceil(len(panels) / columns), 1)
    figure = new_figure(3.6 * columns, 2.6 * lines + 0.8, dpi=110)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(grid.flat, panels, strict=False):
        _panel(axes, name, found)
    if panels:
        figure.legend(
            *grid.flat[0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
        )
    figure.savefig(path)


def _panel(axes: Any, name: str, found: Empirical) -> None:
    histogram = found.histogram
    worlds = (
        (histogram.without, BLUE, "without the canary"),
        (histogram.with_canary, ORANGE, "with it"),
    )
    for counts, colour, label in worlds:
        axes.stairs(counts, histogram.edges, fill=True, alpha=0.5, color=colour, label=label)
    axes.axvline(found.threshold, color=GREY, linestyle="--", linewidth=1, label="threshold")
    title = f"{name}\nmu at least {found.mu_lower:.2f}, claimed {found.mu:.2f}"
    axes.set_title(title, fontsize=8)
    axes.set_xlabel("score (claimed standard deviations)", fontsize=7)
    axes.tick_params(labelsize=7)
    open_frame(axes)
