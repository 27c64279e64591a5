"""What the commands' pictures have in common; matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette, which colour-blind readers can tell apart.
GREEN, BLUE, RED = "#009E73", "#0072B2", "#D55E00"
ORANGE, PURPLE, SKY = "#E69F00", "#CC79A7", "#56B4E9"
GREY, BLACK = "#444444", "#000000"
# For curves without a colour of their own.
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY)


def new_figure(width: float, height: float, dpi: int) -> Any:
    """Return a figure of this size in inches, whose parts make room for each other."""
    # A figure of its own: pyplot would keep global state and may ask for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_band(
    axes: Any,
    places: Sequence[object],
    rows: Sequence[tuple[float, float, float]],
    *,
    colour: str,
    marker: str,
    **line: Any,
) -> Any:
    """Draw a curve in the band that it stands for.

    Args:
        axes: to draw on.
        places: of the points, from left to right.
        rows: of each point its lower end, its middle and its upper end.
        colour: of the curve and the band.
        marker: of the points: what the colour says, said again.
        **line: more about the curve, as matplotlib takes it.

    Returns:
        The curve, for a legend.
    """
    low, middle, high = zip(*rows, strict=True)
    (curve,) = axes.plot(places, middle, color=colour, marker=marker, markersize=4, **line)
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    return curve


def draw_level(axes: Any, height: float, **line: Any) -> None:
    """Draw a level that curves are compared with."""
    axes.axhline(height, color=GREY, linestyle="--", **line)


def open_frame(axes: Any) -> None:
    """Leave the frame open above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
