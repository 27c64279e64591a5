"""A record as Markdown, which also reads well on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from opacus_bpclip.bench.results import ArmResult, BenchRecord, Comparison, Spread, compared_arms
from opacus_bpclip.bench.settings import DEFAULT, GROWTHS, NON_PRIVATE, OPACUS
from opacus_bpclip.bench.targets import BEST, verdicts
from opacus_bpclip.jobs.tables import PAGE, Style, markdown

_EMPTY = "No results yet."
_DECISIVE = ("python", "torch", "opacus", "opacus_bpclip")
_MET = {True: "yes", False: "**no**", None: "-"}


def tables(record: BenchRecord, style: Style = PAGE) -> str:
    """Return everything: circumstances, targets, a table for each case, growth curves.

    In Markdown whatever the style: it also reads well on a terminal.
    """
    if not record.results:
        return _EMPTY
    heading = (
        f"{_circumstances(record)} Ratios are to training the same model without privacy "
        "(compiled arms: to the compiled one) in the same round, or for memory to its median "
        "peak; quartiles in brackets."
    )
    return "\n\n".join([heading, *_targets(record), *map(_case, record.cases), *_growths(record)])


def summary(record: BenchRecord) -> str:
    """Return one table with a line for each case: what the default options cost.

    Time and memory, against training without privacy and against the best that Opacus has for each.
    """
    rows = [["case", "without privacy", *(f"Opacus's {best} mode" for best in BEST.values())]]
    for own in record.cases:
        if own.arm(DEFAULT) is not None:
            rivals = [own.best_of(quantity, OPACUS) for quantity in BEST]
            cells = [f"{_pair(own, DEFAULT, each)} (`{each}`)" if each else "-" for each in rivals]
            rows.append([own.point.title, _pair(own, DEFAULT, NON_PRIVATE), *cells])
    if len(rows) == 1:
        return _EMPTY
    note = (
        'Time of a whole training step / its peak memory with `clipping="backprop"`, as ratios to '
        "what each column names (medians; below 1 is faster or smaller)."
    )
    return f"{note}\n{_circumstances(record)}\n\n{markdown(rows)}"


def _circumstances(record: BenchRecord) -> str:
    settings = record.settings
    used = ", ".join(f"{name} {record.versions.get(name)}" for name in _DECISIVE)
    device = record.hardware if settings.device == "cuda" else f"{settings.threads} CPU thread(s)"
    computed = "" if settings.precision == "float32" else f", {settings.precision} by autocast"
    return f"{device}{computed}; {used}."


def _targets(record: BenchRecord) -> Iterator[str]:
    rows = [["case", "arm", "what", "target", "measured", "met"]]
    for own in (verdict for comparison in record.results for verdict in verdicts(comparison)):
        limit = f"{'<' if own.strict else '<='} {own.limit:.2f}"
        rows.append(
            [own.case, f"`{own.arm}`", own.what, limit, _number(own.measured), _MET[own.met]]
        )
    if len(rows) > 1:
        yield f"### Targets\n\n{markdown(rows)}"


def _case(comparison: Comparison) -> str:
    rows = [["arm", "time", "step", "memory", "peak"]]
    rows += [_row(comparison, own) for own in comparison.arms if own.failure is None]
    failures = [
        f"- `{own.arm}` does not run: {own.failure}"
        for own in comparison.arms
        if own.failure is not None
    ]
    rounds = max((len(own.seconds) for own in comparison.arms), default=0)
    text = f"{comparison.parameters:,} parameters; rounds: {rounds}."
    parts = [f"### {comparison.point.title}", text, markdown(rows), "\n".join(failures)]
    return "\n\n".join(filter(None, parts))


def _row(comparison: Comparison, own: ArmResult) -> list[str]:
    step = f"{1e3 * statistics.median(own.seconds):.4g} ms" if own.seconds else "-"
    peak = f"{statistics.median(own.peaks) / 2**20:.1f} MiB" if own.peaks else "-"
    time, memory = (_spread(comparison.ratio(quantity, own.arm)) for quantity in BEST)
    return [f"`{own.arm}`", time, step, memory, peak]


def _growths(record: BenchRecord) -> Iterator[str]:
    for axis, curve in record.curves.items():
        arms = compared_arms(curve)
        rows = [[axis, *(f"`{arm}`" for arm in arms)]]
        rows += [[f"{own.point.key[2]:,}", *(_pair(own, arm) for arm in arms)] for own in curve]
        case = curve[0].point.case
        sizes = {"batch size": case.batch_size, **case.sizes}
        del sizes[GROWTHS[axis].field.replace("_", " ")]
        fixed = ", ".join(f"{name} {value:,}" for name, value in sizes.items())
        text = f"Time ratio / memory ratio, medians{fixed and f'; {fixed}'}."
        yield f"### Growth with {axis}: {case.title}\n\n{text}\n\n{markdown(rows)}"


def _pair(own: Comparison, arm: str, to: str | None = None) -> str:
    time, memory = (own.median(quantity, arm, to) for quantity in BEST)
    return "-" if time is None else f"{time:.2f} / {_number(memory)}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
