"""Growth curves as a picture: time and memory over the size that grows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from opacus_bpclip.bench.record import Record
from opacus_bpclip.bench.results import Comparison, Spread
from opacus_bpclip.bench.settings import ARMS, GROWTHS, base_of
from opacus_bpclip.jobs.errors import UsageError

# Okabe and Ito's palette, which colour-blind readers can tell apart; markers say it again.
_COLOURS = ("#009E73", "#0072B2", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#444444")
_MARKERS = "osD^vP*"


def draw(record: Record, path: Path) -> None:
    """Write the growth curves of a record, in the format of the path's suffix.

    A row for each size that grows: time ratios on the left, memory on the right, medians with
    their quartiles as a band.

    Raises:
        UsageError: the record holds no growth curve.
    """
    curves = {
        axis: [own for own in record.comparisons if own.point.axis == axis] for axis in GROWTHS
    }
    drawn = {axis: curve for axis, curve in curves.items() if curve}
    if not drawn:
        raise UsageError("--plot needs a growth curve: --growth, or a file that holds one")
    # A figure of its own: pyplot would keep global state and may ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6 * len(drawn) + 0.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(drawn), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for (axis, curve), (left, right) in zip(drawn.items(), grid, strict=True):
        handles |= _draw(left, axis, curve, "time of a step", Comparison.time_ratio)
        _draw(right, axis, curve, "peak memory", Comparison.memory_ratio)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _draw(
    axes: Any,
    axis: str,
    curve: list[Comparison],
    what: str,
    ratio: Callable[[Comparison, str], Spread | None],
) -> dict[str, Any]:
    handles = {}
    for index, arm in enumerate(arm for arm in ARMS if arm != base_of(arm)):
        found = [(own.point.key[2], spread) for own in curve if (spread := ratio(own, arm))]
        if not found:
            continue
        sizes = [size for size, _ in found]
        colour = _COLOURS[index % len(_COLOURS)]
        (handles[arm],) = axes.plot(
            sizes,
            [spread.median for _, spread in found],
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
        )
        axes.fill_between(
            sizes,
            [spread.low for _, spread in found],
            [spread.high for _, spread in found],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    axes.axhline(1, color="#444444", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{what} / non-private")
    axes.set_title(curve[0].point.case.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return handles
