"""The audit as tables, for a terminal and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from opacus_bpclip.audit.noise_law import NoiseLaw
from opacus_bpclip.audit.results import Audited, AuditRecord
from opacus_bpclip.audit.settings import Settings
from opacus_bpclip.audit.verdict import Verdict
from opacus_bpclip.jobs.tables import Style

Rows = list[list[str]]

_DETERMINISTIC_NOTES = """\
largest change: of the noise-free sum when one example joins, over the claimed sensitivity.
replay: neighbours under the same randomness; every random call, skip and entry must agree."""

_STATISTICAL_NOTES = """\
mu: of the Gaussian mechanism that is claimed; bound: lower bound from the attacker's mistakes.
4 steps: at twice the noise multiplier, from an empty batch, with parameters that move.
epsilon: claimed; bound: lower bound that assumes nothing about the noise's law.
scale: of the noise over the claimed one; p-value: of the Kolmogorov-Smirnov test for its law.
correlation: the largest over parameters and over steps, as a share of what is allowed."""


def render(record: AuditRecord, style: Style) -> str:
    """Return the whole report."""
    parts = [
        heading(record.settings),
        style.title("Neighbours and replay"),
        style.table(_deterministic(record)),
        _DETERMINISTIC_NOTES,
    ]
    statistical = [found.verdict for found in record.asked if found.verdict.is_statistical]
    if statistical:
        parts += [style.title("Empirical epsilon"), style.table(_epsilons(statistical))]
        parts += [style.title("The noise's law"), style.table(_noises(statistical))]
        parts.append(_STATISTICAL_NOTES)
    return "\n\n".join([*parts, style.title("Verdict"), conclusion(record)])


def in_short(found: Audited) -> str:
    """Return a target and its outcome."""
    return f"{found.task.name}: {found.outcome}"


def heading(settings: Settings) -> str:
    """Return what all targets share."""
    text = f"noise multiplier {settings.noise_multiplier:g}, seed {settings.seed}"
    if settings.trials:
        text += (
            f"; statistical checks: {settings.trials} one-step trials in each world, "
            f"alpha {settings.alpha:g} for each target, delta {settings.delta:g}"
        )
    return text


def conclusion(record: AuditRecord) -> str:
    """Return the verdict, and what each convicted target did."""
    verdicts = [found.verdict for found in record.asked]
    counts = {
        outcome: sum(verdict.outcome == outcome for verdict in verdicts)
        for outcome in ("pass", "violation", "asleep")
    }
    lines = []
    for verdict in verdicts:
        for text in verdict.violations:
            lines.append(f"- {verdict.target}: {text}")
        if verdict.outcome == "asleep":
            lines += [f"- {verdict.target}: asleep: {text}" for text in verdict.doubts]
    if counts["violation"]:
        head = f"VIOLATION in {counts['violation']} of {len(verdicts)} targets:"
    elif counts["asleep"]:
        head = (
            f"INCONCLUSIVE: the audit was asleep on {counts['asleep']} of {len(verdicts)} targets:"
        )
    else:
        number = f"all {len(verdicts)} targets" if len(verdicts) > 1 else "the target"
        head = f"pass: no violation found in {number}. This is evidence, not proof."
    return "\n".join([head, *([""] if lines else []), *lines])


def _deterministic(record: AuditRecord) -> Rows:
    """Return a row for each case, over all its combinations of allocation, bound and loss."""
    rows = [["target", "combinations", "pairs", "largest change", "replay", "verdict"]]
    groups: dict[str, list[Verdict]] = {}
    for found in record.asked:
        groups.setdefault(found.task.case or found.task.name, []).append(found.verdict)
    for name, verdicts in groups.items():
        worst = max(v.neighbours.change / v.neighbours.sensitivity for v in verdicts)
        differences = sum(bool(v.replay.differences) for v in verdicts)
        clear = not any(v.neighbours.violations or v.replay.violations for v in verdicts)
        asleep = any(v.neighbours.doubts for v in verdicts)
        rows.append(
            [
                name,
                str(len(verdicts)),
                str(sum(v.neighbours.pairs for v in verdicts)),
                f"{worst:.4f}",
                f"{differences} differ" if differences else "same",
                ("asleep" if asleep else "pass") if clear else "VIOLATION",
            ]
        )
    return rows


def _epsilons(verdicts: Sequence[Verdict]) -> Rows:
    rows = [
        ["target", "steps", "trials", "mu", "bound", "tightness", "epsilon", "bound", "verdict"]
    ]
    for verdict in verdicts:
        for found in verdict.empirical:
            rows.append(
                [
                    verdict.target,
                    str(found.steps),
                    str(found.trials),
                    f"{found.mu:.3f}",
                    f"{found.mu_lower:.3f}",
                    f"{found.tightness:.2f}",
                    f"{found.epsilon:.2f}",
                    f"{found.epsilon_lower:.2f}",
                    _word(found.violations, found.doubts),
                ]
            )
    return rows


def _noises(verdicts: Sequence[Verdict]) -> Rows:
    rows = [["target", "batch", "draws", "scale", "p-value", "correlation", "verdict"]]
    for verdict in verdicts:
        for law in verdict.noise:
            rows.append(
                [
                    verdict.target,
                    law.batch.removeprefix("an ").removesuffix(" batch"),
                    str(law.draws),
                    f"{law.scale:.4f}",
                    f"{law.p_value:.2g}",
                    _correlation(law),
                    _word(law.violations, law.doubts),
                ]
            )
    return rows


def _correlation(law: NoiseLaw) -> str:
    values = (law.correlation_entries, law.correlation_steps)
    shares = [value / limit for value, limit in zip(values, law.correlation_limit, strict=True)]
    return f"{max(shares):.2f}"


def _word(violations: Sequence[str], doubts: Sequence[str]) -> str:
    return "VIOLATION" if violations else "asleep" if doubts else "pass"
