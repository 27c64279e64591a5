"""Growth curves as a picture: time and memory over the size that grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opacus_bpclip.bench.results import BenchRecord, Comparison, Spread
from opacus_bpclip.bench.settings import ARMS, GROWTHS, base_of
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


def draw(record: BenchRecord, path: Path) -> None:
    """Write the growth curves of a record, in the format of the path's suffix.

    A row for each size that grows: time ratios on the left, memory on the right, medians with
    their quartiles as a band.

    Raises:
        UsageError: the record holds no growth curve.
    """
    curves = {axis: [own for own in record.results if own.point.axis == axis] for axis in GROWTHS}
    drawn = {axis: curve for axis, curve in curves.items() if curve}
    if not drawn:
        raise UsageError("--plot needs a growth curve: --growth, or a file that holds one")
    figure = new_figure(9, 3.6 * len(drawn) + 0.4, dpi=130)
    grid = figure.subplots(len(drawn), 2, squeeze=False)
    handles: dict[str, Any] = {}
    measured = {own.arm for curve in drawn.values() for point in curve for own in point.arms}
    arms = [arm for arm in ARMS if arm in measured and arm != base_of(arm)]
    for (axis, curve), (left, right) in zip(drawn.items(), grid, strict=True):
        handles |= _draw(left, axis, curve, arms, "time of a step", Comparison.time_ratio)
        _draw(right, axis, curve, arms, "peak memory", Comparison.memory_ratio)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _draw(
    axes: Any,
    axis: str,
    curve: list[Comparison],
    arms: Sequence[str],
    what: str,
    ratio: Callable[[Comparison, str], Spread | None],
) -> dict[str, Any]:
    handles = {}
    for index, arm in enumerate(arms):
        found = [(own.point.key[2], spread) for own in curve if (spread := ratio(own, arm))]
        if not found:
            continue
        handles[arm] = draw_band(
            axes,
            [size for size, _ in found],
            [(spread.low, spread.median, spread.high) for _, spread in found],
            colour=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
        )
    draw_level(axes, 1, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{what} / non-private")
    axes.set_title(curve[0].point.case.title, fontsize=10)
    axes.grid(alpha=0.3)
    open_frame(axes)
    return handles
