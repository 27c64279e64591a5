"""The comparison as a picture: test accuracy over the epsilon spent."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from opacus_bpclip.ab.results import ArmResult, ComparisonRecord
from opacus_bpclip.ab.settings import (
    BACKPROP,
    FLAT,
    FLAT_INPUT_CLIPPING,
    LAYERWISE,
    NON_PRIVATE,
    PAPER,
    Settings,
)
from opacus_bpclip.jobs.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    RED,
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
    BACKPROP: (GREEN, "o", (0, (2, 4)), 1.8, 2.4),
    PAPER: (RED, "v", ":", 1.8, 2.5),
}


def draw(record: ComparisonRecord, path: Path) -> None:
    """Write the plot of a comparison, in the format of the path's suffix.

    Private arms are curves over their epochs, mean over seeds in a band from the smallest to the
    largest; the non-private arm, which has no epsilon, is a line at its final accuracy.
    """
    figure = new_figure(7.2, 4.8, dpi=150)
    axes = figure.add_subplot()
    for result in record.asked:
        if result.arm == NON_PRIVATE:
            draw_level(axes, 100 * result.accuracy_mean, linewidth=1.5, label=legend(result))
        else:
            _draw_curve(axes, result)
    _label(axes, record)
    # Below the axes, where no curve can run under it.
    figure.legend(
        loc="outside lower center",
        ncols=2,
        handlelength=3.5,  # long enough for the dashes to be told apart
        title=_legend_title(record.settings),
        frameon=False,
    )
    figure.savefig(path)


def _draw_curve(axes: Any, result: ArmResult) -> None:
    colour, marker, dashes, width, height = _STYLES[result.arm]
    epsilons = [epoch.epsilon for epoch in result.seeds[0].epochs]
    by_epoch = [
        [100 * epoch.accuracy for epoch in epochs]
        for epochs in zip(*(seed.epochs for seed in result.seeds), strict=True)
    ]
    rows = [(min(values), fmean(values), max(values)) for values in by_epoch]
    line = {"linestyle": dashes, "linewidth": width, "zorder": height, "label": legend(result)}
    draw_band(axes, epsilons, rows, colour=colour, marker=marker, **line)


def legend(result: ArmResult) -> str:
    """Return an arm and its accuracy in a few words."""
    return f"{result.arm}: {result.accuracy_mean:.1%}"


def _label(axes: Any, record: ComparisonRecord) -> None:
    settings = record.settings
    axes.set_xlabel(f"epsilon spent (delta = {settings.delta:g})")
    axes.set_ylabel("test accuracy (%)")
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


def _legend_title(settings: Settings) -> str:
    seeds = len(settings.seeds)
    if seeds == 1:
        return "final accuracy, one seed"
    return f"final accuracy, mean of {seeds} seeds (band: smallest to largest)"
