"""The costs that `fine_tuning.py` has measured, as a table and as curves.

    python benchmarks/fine_tuning_report.py docs/fine-tuning.jsonl --plot docs/fine-tuning.png

Times are ratios within rounds, and medians of these: seconds are those of one machine at one time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opacus_bpclip.bench.results import Spread
from opacus_bpclip.jobs.figures import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    draw_band,
    draw_level,
    new_figure,
    open_frame,
)
from opacus_bpclip.jobs.tables import markdown

BASE, GHOST = "non-private", "opacus ghost"
CURVES = {
    BASE: (GREEN, "o"),
    GHOST: (RED, "s"),
    "backprop joint": (BLUE, "D"),
    "backprop layerwise": (ORANGE, "^"),
}
SIZE = {"length": 32, "batch": 32, "width": 384}  # of the table, and where the curves cross
TITLES = {
    "length": "tokens of a sentence",
    "batch": "sentences of a batch",
    "width": "width of the encoder",
}
MIB = 2**20


class Costs:
    """Measurements, by what they depend on.

    Args:
        lines: of the file of `fine_tuning.py`.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = [json.loads(line) for line in lines if line]
        for line in self._lines:
            line["of"].setdefault("width", SIZE["width"])

    def find(self, **of: Any) -> list[Any]:
        """Return the results of the measurements that depend on this, the latest last."""
        return [line["result"] for line in self._lines if of.items() <= line["of"].items()]

    def sizes(self, axis: str) -> list[int]:
        """Return the sizes along an axis, at the table's size of the other one."""
        other = {name: value for name, value in SIZE.items() if name != axis}
        own = [line["of"] for line in self._lines if line["of"].get("what") == "full"]
        peaks = [of for of in own if of["measured"] == "peak" and other.items() <= of.items()]
        return sorted({of[axis] for of in peaks})

    def time(self, arm: str, to: str, **of: Any) -> Spread | None:
        """Return the ratios of an arm's seconds to another arm's in the same round."""
        for found in reversed(self.find(measured="seconds", **of)):
            if arm in found and to in found:
                return Spread.of([a / b for a, b in zip(found[arm], found[to], strict=True)])
        return None

    def peak(self, arm: str, **of: Any) -> int | None:
        """Return the peak of an arm in bytes."""
        found = self.find(measured="peak", arm=arm, **of)
        return found[-1] if found else None


def table(costs: Costs, limit: float = 4.0) -> str:
    """Return a table with a row for each model and arm.

    Args:
        costs: what was measured.
        limit: GiB; there is a column for the largest batch within it if one was searched.
    """
    header = ["trained", "arm", "time / non-private", "time / ghost", "peak memory"]
    header.append("memory / ghost")
    searched = {"measured": "largest batch", "limit": limit}
    if costs.find(**searched):
        header.append(f"largest batch in {limit:g} GiB")
    rows = [header]
    for what in ("full", "lora", "head"):
        for arm in _arms(costs, what):
            of = {"what": what, **SIZE}
            to_base, to_ghost = costs.time(arm, BASE, **of), costs.time(arm, GHOST, **of)
            peak, ghost = costs.peak(arm, **of), costs.peak(GHOST, **of)
            largest = costs.find(**searched, what=what, arm=arm)
            row = [
                what,
                arm,
                _ratio(to_base and to_base.median),
                _ratio(to_ghost and to_ghost.median),
                f"{peak / MIB:.0f} MiB" if peak else "-",
                _ratio(peak / ghost if peak and ghost else None),
                str(largest[-1]) if largest else "-",
            ]
            rows.append(row[: len(header)])
    return markdown(rows)


def _arms(costs: Costs, what: str) -> list[str]:
    arms = (BASE, "opacus hooks", *list(CURVES)[1:])
    return [arm for arm in arms if costs.find(arm=arm, what=what)]


def _at(axis: str, size: int) -> dict[str, Any]:
    return {"what": "full", **SIZE, axis: size}


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw(costs: Costs, path: Path) -> None:
    """Write the curves of full fine-tuning: time on the left, peak memory on the right."""
    axes_of = [axis for axis in TITLES if len(costs.sizes(axis)) > 1]
    figure = new_figure(9, 3.6 * len(axes_of), dpi=130)
    grid = figure.subplots(len(axes_of), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for axis, (left, right) in zip(axes_of, grid, strict=True):
        sizes = costs.sizes(axis)
        for arm, (colour, marker) in CURVES.items():
            style = {"colour": colour, "marker": marker}
            of = [_at(axis, size) for size in sizes]
            times = [
                (size, costs.time(arm, BASE, **own)) for size, own in zip(sizes, of, strict=True)
            ]
            peaks = [(size, costs.peak(arm, **own)) for size, own in zip(sizes, of, strict=True)]
            spreads = {size: spread for size, spread in times if spread}
            levels = {size: Spread.of([peak / MIB]) for size, peak in peaks if peak}
            if spreads and arm != BASE:
                draw_band(left, list(spreads), list(spreads.values()), **style)
            if levels:
                handles[arm] = draw_band(right, list(levels), list(levels.values()), **style)
        draw_level(left, 1, linewidth=1)
        measured = [size for size in sizes if costs.time(GHOST, BASE, **_at(axis, size))]
        left.set_visible(len(measured) > 1)  # one point is no curve
        left.set_ylabel("time of a step / non-private")
        right.set_ylabel("peak memory, MiB")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel(TITLES[axis])
            axes.grid(alpha=0.3)
            open_frame(axes)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, help="a file of fine_tuning.py")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    costs = Costs(args.json.read_text().splitlines())
    print(table(costs))
    if args.plot is not None:
        draw(costs, args.plot)


if __name__ == "__main__":
    main()
