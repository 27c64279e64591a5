"""The comparison as a table for human eyes."""

from __future__ import annotations

from opacus_bpclip.ab.results import ArmResult, ComparisonRecord
from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.ab.training import WARM_UP_STEPS
from opacus_bpclip.jobs.tables import Style

_NOTES = f"""\
accuracy: on the test set after the last epoch, mean over seeds; range: smallest to largest seed.
time per step: median of forward, backward and optimizer, the first {WARM_UP_STEPS} steps left out.
peak memory: largest growth during training steps over what was held just before training."""


_HEADER = [
    "arm",
    "accuracy",
    "range",
    "epsilon",
    "delta",
    "noise multiplier",
    "time per step",
    "peak memory",
]


def render(record: ComparisonRecord, style: Style) -> str:
    """Return the settings in short, a table with a line for each finished arm, and its legend."""
    rows = [_HEADER, *(_row(record, result) for result in record.asked)]
    return f"{heading(record)}\n\n{style.table(rows)}\n\n{_NOTES}"


def heading(record: ComparisonRecord) -> str:
    """Return the facts that all arms share."""
    settings, plan = record.settings, record.plan
    batch = plan.train_examples * plan.sample_rate
    lines = [
        f"{settings.title}: {plan.train_examples} training and {plan.test_examples} test examples, "
        f"model of {plan.parameters:,} parameters",
        f"epochs: {settings.epochs}, each of {plan.steps_per_epoch} Poisson batches, {batch:.0f} "
        f"examples expected, SGD with lr {settings.lr:g} and momentum {settings.momentum:g}, "
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


def _options(settings: Settings, arm: str) -> str:
    """Return in words what sets an arm's clipping apart; empty for an arm without options."""
    norm, own = settings.input_norm(arm), settings.backprop(arm)
    inputs = f"max_input_norm {'none' if norm is None else format(norm, 'g')}"
    if own is None:
        return inputs if norm else ""
    scaling = ", normalize" if own.normalize else ""
    return f"allocation {own.allocation}, bound {own.bound}, {inputs}{scaling}"


def _row(record: ComparisonRecord, result: ArmResult) -> list[str]:
    privacy = ["-", "-", "-"]
    if result.epsilon is not None:
        noise = record.plan.noise_multiplier
        privacy = [f"{result.epsilon:.3f}", f"{record.settings.delta:g}", f"{noise:.4g}"]
    peak = result.peak_memory_bytes
    return [
        result.arm,
        f"{result.accuracy_mean:.2%}",
        f"{100 * result.accuracy_min:.2f}..{100 * result.accuracy_max:.2f}",
        *privacy,
        f"{1e3 * result.seconds_per_step:.2f} ms",
        "unknown" if peak is None else f"{peak / 2**20:.1f} MiB",
    ]
