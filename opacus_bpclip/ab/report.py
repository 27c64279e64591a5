"""The comparison as a table for human eyes."""

from __future__ import annotations

from statistics import fmean, median

from opacus_bpclip.ab.results import ArmResult, ComparisonRecord, Plan
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.training import WARM_UP_STEPS
from opacus_bpclip.jobs.tables import Style

_NOTES = f"""\
{{}}: on the test set after the last epoch, mean over seeds; range: smallest to largest seed.
time per step: median of forward, backward and optimizer, the first {WARM_UP_STEPS} steps left out.
peak memory: largest growth during training steps over what was held just before training."""


_COLUMNS = ["range", "epsilon", "delta", "noise multiplier", "time per step", "peak memory"]


def render(record: ComparisonRecord, style: Style) -> str:
    """Return the settings in short, a table with a line for each finished arm, and its legend."""
    measure = record.plan.measure
    header = ["arm", measure.title, *_COLUMNS]
    rows = [header, *(_row(record, result) for result in record.asked)]
    notes = [_NOTES.format(measure.name)]
    notes += [in_short(result) for result in record.asked if result.note]
    return "\n\n".join([heading(record), style.table(rows), *notes])


def in_short(result: ArmResult) -> str:
    """Return an arm and what came of it in one line."""
    if result.note:
        when = "failed in training" if result.failed else "cannot train this model"
        return f"{result.arm} {when}: {result.note}"
    return f"{result.arm}: {result.metric_mean:.4g}"


def heading(record: ComparisonRecord) -> str:
    """Return the facts that all arms share."""
    settings, plan = record.settings, record.plan
    batch = plan.train_examples * plan.sample_rate
    lines = [
        sizes(settings, plan),
        f"epochs: {settings.epochs}, each of {plan.steps_per_epoch} Poisson batches, {batch:.0f} "
        f"examples expected, {_optimizer(settings)}, "
        f"seeds {' '.join(map(str, settings.seeds))}"
        + f", {settings.precision} by autocast"
        * (settings.precision != "float32"),
    ]
    if settings.is_private:
        lines.append(
            f"target epsilon {settings.epsilon:g}, max_grad_norm {settings.max_grad_norm:g}"
        )
    lines += [f"{arm}: {options}" for arm in settings.arms if (options := _options(settings, arm))]
    return "\n".join(lines)


def sizes(settings: Settings, plan: Plan) -> str:
    """Return how large the data and the model are."""
    return (
        f"{settings.title}: {plan.train_examples} training and {plan.test_examples} test examples, "
        f"model of {plan.parameters:,} parameters"
    )


def _optimizer(settings: Settings) -> str:
    momentum = "" if settings.momentum is None else f" and momentum {settings.momentum:g}"
    schedule = f", {settings.schedule}" if settings.schedule else ""
    rows = settings.physical_batch_size
    decay = settings.weight_averaging
    average = f", weights averaged with decay {decay:g}" if decay else ""
    views = f" of {settings.views} views" if settings.views > 1 else ""
    data = f", inputs{views} by {settings.transform}" if settings.transform else ""
    physical = f", physical batches of at most {rows}" if rows else ""
    return (
        f"{settings.optimizer} with lr {settings.lr:g}{momentum}{schedule}{average}{data}{physical}"
    )


def _options(settings: Settings, arm: str) -> str:
    """Return in words what sets an arm's clipping apart; empty for an arm without options."""
    norm, own = settings.input_norm(arm), settings.backprop(arm)
    inputs = f"max_input_norm {'none' if norm is None else format(norm, 'g')}"
    if own is None:
        return inputs if norm else ""
    more = ", normalize" if own.normalize else ""
    if own.whitening is not None:
        more += ", inputs whitened by pink noise"
    return f"allocation {own.allocation}, bound {own.bound}, {inputs}{more}"


def _row(record: ComparisonRecord, result: ArmResult) -> list[str]:
    if not result.seeds:
        return [result.arm, "-", "-", "-", "-", "-", "-", "-"]
    privacy = ["-", "-", "-"]
    if result.epsilon is not None:
        noise = record.plan.noise_multiplier
        privacy = [f"{result.epsilon:.3f}", f"{record.settings.delta:g}", f"{noise:.4g}"]
    show, peak = record.plan.measure.show, result.peak_memory_bytes
    return [
        result.arm,
        show(fmean(result.metrics)),
        "..".join(show(end).rstrip("%") for end in (min(result.metrics), max(result.metrics))),
        *privacy,
        f"{1e3 * median(seed.seconds_per_step for seed in result.seeds):.2f} ms",
        "unknown" if peak is None else f"{peak / 2**20:.1f} MiB",
    ]
