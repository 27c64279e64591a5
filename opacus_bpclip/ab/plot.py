"""The comparison as a picture: the metric on the test set over the epsilon spent."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from opacus_bpclip.ab.results import ArmResult, ComparisonRecord, Measure
from opacus_bpclip.ab.settings import (
    ADAPTIVE,
    BACKPROP,
    EXPANDED_WEIGHTS,
    FLAT,
    FLAT_INPUT_CLIPPING,
    FUNCTORCH,
    GHOST,
    LAYERWISE,
    NON_PRIVATE,
    PAPER,
    PER_LAYER,
    WHITENED,
)
from opacus_bpclip.jobs.figures import (
    BLACK,
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

# Colour, marker, dashes, width and height in the pile. Where curves agree, as flat's and backprop's
# should, those above are thinner and broken, and let those below be seen.
_STYLES = {
    FLAT: (BLUE, "s", "-", 4.0, 2.1),
    FLAT_INPUT_CLIPPING: (ORANGE, "^", "-", 2.6, 2.2),
    LAYERWISE: (PURPLE, "D", (0, (4, 2)), 1.8, 2.3),
    WHITENED: (BLACK, "h", "-", 1.8, 2.35),
    BACKPROP: (GREEN, "o", (0, (2, 4)), 1.8, 2.4),
    PAPER: (RED, "v", ":", 1.8, 2.5),
    FUNCTORCH: (SKY, "1", "-", 3.6, 2.11),
    EXPANDED_WEIGHTS: (SKY, "2", "-", 3.4, 2.12),
    GHOST: (SKY, "P", "-", 3.2, 2.13),
    PER_LAYER: (GREY, "X", (0, (4, 2)), 1.8, 2.21),
    ADAPTIVE: (GREY, "*", ":", 1.8, 2.22),
}


def draw(record: ComparisonRecord, path: Path) -> None:
    """Write the plot of a comparison, in the format of the path's suffix.

    Private arms are curves over their epochs, mean over seeds in a band from the smallest to the
    largest; the non-private arm, which has no epsilon, is a line at its final metric.
    """
    figure = new_figure(7.2, 4.8, dpi=150)
    axes = figure.add_subplot()
    measure = record.plan.measure
    for result in record.asked:
        if result.arm == NON_PRIVATE and result.seeds:
            level = scaled(measure, fmean(result.metrics))
            draw_level(axes, level, linewidth=1.5, label=_legend(measure, result))
        elif result.seeds:
            _draw_curve(axes, measure, result)
    _label(axes, record)
    # Below the axes, where no curve can run under it.
    figure.legend(
        loc="outside lower center",
        ncols=2,
        handlelength=3.5,  # long enough for the dashes to be told apart
        title=_legend_title(record),
        frameon=False,
    )
    figure.savefig(path)


def _draw_curve(axes: Any, measure: Measure, result: ArmResult) -> None:
    colour, marker, dashes, width, height = _STYLES[result.arm]
    epsilons = [epoch.epsilon for epoch in result.seeds[0].epochs]
    by_epoch = [
        [scaled(measure, epoch.metric) for epoch in epochs]
        for epochs in zip(*(seed.epochs for seed in result.seeds), strict=True)
    ]
    rows = [(min(values), fmean(values), max(values)) for values in by_epoch]
    label = _legend(measure, result)
    line = {"linestyle": dashes, "linewidth": width, "zorder": height, "label": label}
    draw_band(axes, epsilons, rows, colour=colour, marker=marker, **line)


def _legend(measure: Measure, result: ArmResult) -> str:
    return f"{result.arm}: {measure.show(fmean(result.metrics), digits=1)}"


def scaled(measure: Measure, value: float) -> float:
    """Return a metric's place on an axis, where shares are in percent."""
    return 100 * value if measure.percent else value


def _label(axes: Any, record: ComparisonRecord) -> None:
    settings = record.settings
    axes.set_xlabel(f"epsilon spent (delta = {settings.delta:g})")
    measure = record.plan.measure
    axes.set_ylabel(f"test {measure.title}{' (%)' if measure.percent else ''}")
    axes.set_title(_title(record), fontsize=10)
    axes.grid(alpha=0.3)
    open_frame(axes)


def _title(record: ComparisonRecord) -> str:
    settings, plan = record.settings, record.plan
    input_norm = "none" if settings.max_input_norm is None else f"{settings.max_input_norm:g}"
    noise = f", noise multiplier {plan.noise_multiplier:.3g}" if settings.is_private else ""
    return (
        f"{settings.title}: {plan.parameters:,} parameters, epochs: {settings.epochs}, "
        f"expected batch {plan.train_examples * plan.sample_rate:.0f}{noise}\n"
        f"max_grad_norm {settings.max_grad_norm:g}, backprop's bound {settings.bound} and "
        f"max_input_norm {input_norm}"
    )


def _legend_title(record: ComparisonRecord) -> str:
    name, seeds = record.plan.measure.name, len(record.settings.seeds)
    if seeds == 1:
        return f"final {name}, one seed"
    return f"final {name}, mean of {seeds} seeds (band: smallest to largest)"
