"""Growth curves as a picture: time and memory over the size that grows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opacus_bpclip.bench.results import BenchRecord, Comparison, Quantity, compared_arms
from opacus_bpclip.jobs.errors import UsageError
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

_COLOURS = (GREEN, BLUE, RED, ORANGE, PURPLE, SKY, GREY)
_MARKERS = "osD^vP*"
_TITLES: dict[Quantity, str] = {"time": "time of a step", "memory": "peak memory"}


def draw(record: BenchRecord, path: Path) -> None:
    """Write the growth curves of a record, in the format of the path's suffix.

    A row for each size that grows: time ratios on the left, memory on the right, medians with
    their quartiles as a band.

    Raises:
        UsageError: the record holds no growth curve.
    """
    curves = record.curves
    if not curves:
        raise UsageError("--plot needs a growth curve: --growth, or a file that holds one")
    figure = new_figure(9, 3.6 * len(curves) + 0.4, dpi=130)
    grid = figure.subplots(len(curves), 2, squeeze=False)
    handles: dict[str, Any] = {}
    arms = compared_arms(own for curve in curves.values() for own in curve)
    for (axis, curve), row in zip(curves.items(), grid, strict=True):
        for quantity, axes in zip(_TITLES, row, strict=True):
            axes.set_xlabel(axis)
            handles |= _draw(axes, curve, arms, quantity)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _draw(
    axes: Any, curve: list[Comparison], arms: Sequence[str], quantity: Quantity
) -> dict[str, Any]:
    handles = {}
    for index, arm in enumerate(arms):
        found = [(own.point.key[2], own.ratio(quantity, arm)) for own in curve]
        spreads = {size: spread for size, spread in found if spread is not None}
        if spreads:
            handles[arm] = draw_band(
                axes,
                list(spreads),
                list(spreads.values()),
                colour=_COLOURS[index % len(_COLOURS)],
                marker=_MARKERS[index % len(_MARKERS)],
            )
    draw_level(axes, 1, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel(f"{_TITLES[quantity]} / non-private")
    axes.set_title(curve[0].point.case.title, fontsize=10)
    axes.grid(alpha=0.3)
    open_frame(axes)
    return handles
