"""A study as tables for human eyes: for each cell one, with a line for each arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opacus_bpclip.ab.report import sizes
from opacus_bpclip.ab.results import Measure
from opacus_bpclip.ab.study.curves import Point, curve, metric_within, shortest_training
from opacus_bpclip.ab.study.results import RunResult, StudyRecord
from opacus_bpclip.ab.study.settings import OF_CELLS, OF_STUDIES, Table
from opacus_bpclip.ab.study.statistics import CONFIDENCE, deviation, paired_difference
from opacus_bpclip.jobs.tables import Style

_COLUMNS = ("deviation", "difference", "epsilon", "training", "equal time", "seeds", "settings")
_NOTES = """\
{metric}: on the test set after the last epoch, mean over seeds; deviation: standard, of a seed.
{difference}training: all steps, mean over seeds; the arms' times compare only on an idle machine.
equal time: {metric} after the last epoch that ended when the fastest private arm was done."""
_DIFFERENCE = f"""\
difference: to {{baseline}} at the same seeds, and its {CONFIDENCE:.0%} confidence interval.
"""


def render(record: StudyRecord, style: Style) -> str:
    """Return a table for each cell, and what is to be known to read them."""
    parts = [_tuning(record)]
    for cell in record.settings.cells:
        parts += [style.title(cell), *_cell(record, cell, style)]
    measure = next((each.plan.measure for each in record.results), Measure("metric"))
    baseline = record.settings.baseline
    difference = _DIFFERENCE.format(baseline=baseline) if baseline else ""
    parts.append(_NOTES.format(metric=measure.name, difference=difference))
    return "\n\n".join(part for part in parts if part)


def in_short(result: RunResult) -> str:
    """Return a run, by its settings that are not the defaults, and what came of it in one line."""
    settings = result.settings
    shared = OF_CELLS | OF_STUDIES | {"lr", "threads", "device"}
    given = settings.model_dump(exclude_defaults=True, exclude=set(shared))
    told = in_words({"lr": settings.lr, **given})
    found = result.plan.measure.show(result.run.metric) if result.run else result.note
    kind = "trial" if settings.held_out else "test"
    return f"{kind}: {result.cell}, {result.arm}, {told}, seed {settings.seed}: {found}"


def in_words(settings: Mapping[str, Any]) -> str:
    """Return settings in one line.

    Example:
        >>> in_words({"lr": 0.5, "options": {"max_input_norm": 3}})
        'lr 0.5, max_input_norm 3'
        >>> in_words({"options": {"threshold": {"initial": 0.1}}})
        'threshold (initial 0.1)'
    """
    flat = {**settings, **settings.get("options", {})}
    hidden = ("arm", "options", "data_root")
    return ", ".join(
        f"{name} ({in_words(value)})" if isinstance(value, dict) else f"{name} {value}"
        for name, value in flat.items()
        if name not in hidden
    )


def _tuning(record: StudyRecord) -> str:
    study = record.settings
    if not study.tuning or not study.arms:
        return ""
    trials = len(study.tuning.points(next(iter(study.arms))))
    return (
        f"Tuning: {trials} combinations for each arm in each cell, with seeds "
        f"{' '.join(map(str, study.tuning.seeds))}, judged by {study.tuning.held_out:.0%} of the "
        "training set, on which they do not train. Epsilon does not account for tuning."
    )


def _cell(record: StudyRecord, cell: str, style: Style) -> list[str]:
    study = record.settings
    arms = {arm: record.published(cell, arm) for arm in study.arms}
    found = [result for results in arms.values() for result in results]
    if not found:
        return ["no results yet"]
    first = found[0]
    shared = in_words({**study.settings, **study.cells[cell]})
    heading = "\n".join(filter(None, [sizes(first.settings, first.plan), shared]))
    measure, curves = first.plan.measure, {arm: curve(own) for arm, own in arms.items()}
    base, within = _metrics(arms.get(study.baseline or "", [])), shortest_training(curves)
    rows = [["arm", measure.title, *_COLUMNS]]
    for arm, results in arms.items():
        told = [
            *_spread(measure, _metrics(results), {} if arm == study.baseline else base),
            *_costs(measure, curves[arm], within),
            f"{sum(each.run is not None for each in results)}",
        ]
        rows.append([arm, *told, in_words(_own_settings(record, cell, arm))])
    notes = dict.fromkeys(f"{each.arm}: {each.note}" for each in found if each.note)
    return [heading, style.table(rows), *notes]


def _own_settings(record: StudyRecord, cell: str, arm: str) -> Table:
    own, chosen = record.settings.arms[arm], record.chosen(cell, arm) or {}
    options = {**own.get("options", {}), **chosen.get("options", {})}
    return {**own, **chosen, "options": options}


def _metrics(results: Sequence[RunResult]) -> dict[int, float]:
    return {each.settings.seed: each.run.metric for each in results if each.run}


def _spread(measure: Measure, own: Mapping[int, float], base: Mapping[int, float]) -> list[str]:
    if not own:
        return ["-", "-", "-"]
    spread = deviation(list(own.values()))
    difference = paired_difference(own, base)
    told = "-"
    if difference:
        mean, *ends = (_signed(measure, each) for each in difference)
        told = f"{mean} [{', '.join(ends)}]"
    return [
        measure.show(fmean(own.values())),
        "-" if spread is None else measure.show(spread),
        told,
    ]


def _costs(measure: Measure, points: Sequence[Point], within: float | None) -> list[str]:
    if not points:
        return ["-", "-", "-"]
    end, early = points[-1], metric_within(points, within)
    return [
        "-" if end.epsilon is None else f"{end.epsilon:.3f}",
        f"{end.seconds:.3g} s",
        "-" if early is None else measure.show(early),
    ]


def _signed(measure: Measure, value: float) -> str:
    return f"{100 * value:+.2f}" if measure.percent else f"{value:+.4g}"
