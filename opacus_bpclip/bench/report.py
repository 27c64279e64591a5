"""A record as Markdown, which also reads well on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

from opacus_bpclip.bench.results import ArmResult, BenchRecord, Comparison, Spread, median_of
from opacus_bpclip.bench.settings import ARMS, DEFAULT, GROWTHS, NON_PRIVATE, base_of
from opacus_bpclip.bench.targets import rivals, verdicts
from opacus_bpclip.jobs.tables import PAGE, Style, markdown

_EMPTY = "No results yet."
_DECISIVE = ("python", "torch", "opacus", "opacus_bpclip")


def tables(record: BenchRecord, style: Style = PAGE) -> str:
    """Return everything: circumstances, targets, a table for each case, growth curves.

    In Markdown whatever the style: it also reads well on a terminal.
    """
    if not record.results:
        return _EMPTY
    return "\n\n".join([_heading(record), *_targets(record), *_cases(record), *_growths(record)])


def summary(record: BenchRecord) -> str:
    """Return one table with a line for each case: what the default options cost.

    Time and memory, against training without privacy and against the best that Opacus has for each.
    """
    rows = [["case", "without privacy", "Opacus's fastest mode", "Opacus's smallest mode"]]
    for own in record.results:
        if own.point.axis is None and own.arm(DEFAULT) is not None:
            cells = (_against(own, other) for other in rivals(own))
            rows.append([title(own), _of_default(own, NON_PRIVATE), *cells])
    if len(rows) == 1:
        return _EMPTY
    note = (
        'Time of a whole training step / its peak memory with `clipping="backprop"`, as ratios to '
        "what each column names (medians; below 1 is faster or smaller)."
    )
    return f"{note}\n{_circumstances(record)}\n\n{markdown(rows)}"


def title(comparison: Comparison) -> str:
    """Return a comparison's name for human eyes, with all sizes."""
    case = comparison.point.case
    sizes = "".join(f", {name} {value:,}" for name, value in case.sizes.items())
    return f"{case.title}, batch {case.batch_size}{sizes}"


def _heading(record: BenchRecord) -> str:
    return (
        f"{_circumstances(record)} Ratios are to training the same model without privacy "
        "(compiled arms: to the compiled one) in the same round, or for memory to its median "
        "peak; quartiles in brackets."
    )


def _circumstances(record: BenchRecord) -> str:
    settings = record.settings
    used = ", ".join(f"{name} {record.versions.get(name)}" for name in _DECISIVE)
    device = record.hardware if settings.device == "cuda" else f"{settings.threads} CPU thread(s)"
    computed = "" if settings.precision == "float32" else f", {settings.precision} by autocast"
    return f"{device}{computed}; {used}."


def _targets(record: BenchRecord) -> Iterator[str]:
    rows = [["case", "arm", "what", "target", "measured", "met"]]
    for comparison in record.results:
        for own in verdicts(comparison):
            sign = "<" if own.strict else "<="
            met = {True: "yes", False: "**no**", None: "-"}[own.met]
            limit = f"{sign} {own.limit:.2f}"
            row = [own.case, f"`{own.arm}`", own.what, limit, _number(own.measured), met]
            rows.append(row)
    if len(rows) > 1:
        yield f"### Targets\n\n{markdown(rows)}"


def _cases(record: BenchRecord) -> Iterator[str]:
    for comparison in record.results:
        if comparison.point.axis is not None:
            continue
        rows = [["arm", "time", "step", "memory", "peak"]]
        rows += [_row(comparison, own) for own in comparison.arms if own.failure is None]
        failures = [
            f"- `{own.arm}` does not run: {own.failure}"
            for own in comparison.arms
            if own.failure is not None
        ]
        rounds = max((len(own.seconds) for own in comparison.arms), default=0)
        text = f"{comparison.parameters:,} parameters; rounds: {rounds}."
        parts = [f"### {title(comparison)}", text, markdown(rows)]
        if failures:
            parts.append("\n".join(failures))
        yield "\n\n".join(parts)


def _row(comparison: Comparison, own: ArmResult) -> list[str]:
    step = f"{1e3 * statistics.median(own.seconds):.4g} ms" if own.seconds else "-"
    peak = f"{statistics.median(own.peaks) / 2**20:.1f} MiB" if own.peaks else "-"
    time, memory = comparison.time_ratio(own.arm), comparison.memory_ratio(own.arm)
    return [f"`{own.arm}`", _spread(time), step, _spread(memory), peak]


def _growths(record: BenchRecord) -> Iterator[str]:
    for axis in GROWTHS:
        curve = [own for own in record.results if own.point.axis == axis]
        if not curve:
            continue
        arms = _in_order(own.arm for comparison in curve for own in comparison.arms)
        rows = [[axis, *(f"`{arm}`" for arm in arms)]]
        for own in curve:
            cells = (_pair(own.time_ratio(arm), own.memory_ratio(arm)) for arm in arms)
            rows.append([f"{own.point.key[2]:,}", *cells])
        fixed = ", ".join(_fixed_sizes(curve[0]))
        text = "Time ratio / memory ratio, medians" + f"; {fixed}" * bool(fixed) + "."
        yield f"### Growth with {axis}: {curve[0].point.case.title}\n\n{text}\n\n{markdown(rows)}"


def _fixed_sizes(comparison: Comparison) -> Iterator[str]:
    assert comparison.point.axis is not None
    varying = GROWTHS[comparison.point.axis].field
    case = comparison.point.case
    for name, value in {"batch_size": case.batch_size, **case.sizes}.items():
        if name != varying:
            yield f"{name.replace('_', ' ')} {value:,}"


def _in_order(arms: Iterable[str]) -> list[str]:
    found = set(arms)
    return [arm for arm in ARMS if arm in found and arm != base_of(arm)]


def _against(own: Comparison, rival: str | None) -> str:
    return "-" if rival is None else f"{_of_default(own, rival)} (`{rival}`)"


def _of_default(own: Comparison, base: str) -> str:
    return _pair(own.time_ratio(DEFAULT, to=base), own.memory_ratio(DEFAULT, to=base))


def _pair(time: Spread | None, memory: Spread | None) -> str:
    if time is None:
        return "-"
    return f"{time.median:.2f} / {_number(median_of(memory))}"


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
