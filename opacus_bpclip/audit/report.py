"""The audit as tables, for a terminal and as a page in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from opacus_bpclip.audit.results import Audited, AuditRecord
from opacus_bpclip.audit.verdict import Check, Verdict, outcome_of
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
    settings, verdicts = record.settings, [found.verdict for found in record.asked]
    heading = f"noise multiplier {settings.noise_multiplier:g}, seed {settings.seed}"
    if settings.trials:
        heading += (
            f"; statistical checks: {settings.trials} one-step trials in each world, "
            f"alpha {settings.alpha:g} for each target, delta {settings.delta:g}"
        )
    sections = [("Neighbours and replay", _deterministic(record), _DETERMINISTIC_NOTES)]
    if any(verdict.empirical for verdict in verdicts):
        sections.append(("Empirical epsilon", _epsilons(verdicts), ""))
        sections.append(("The noise's law", _noises(verdicts), _STATISTICAL_NOTES))
    parts = [heading]
    for title, rows, notes in sections:
        parts += [style.title(title), style.table(rows), *([notes] if notes else [])]
    return "\n\n".join([*parts, style.title("Verdict"), conclusion(verdicts)])


def in_short(found: Audited) -> str:
    """Return a target and its outcome."""
    return f"{found.task.name}: {found.verdict.outcome}"


def conclusion(verdicts: Sequence[Verdict]) -> str:
    """Return the verdict, and what each target did that failed or could not be judged."""
    failed, unsure = (
        [verdict for verdict in verdicts if verdict.outcome == outcome]
        for outcome in ("violation", "inconclusive")
    )
    lines = [f"- {verdict.target}: {text}" for verdict in failed for text in verdict.violations]
    lines += [
        f"- {verdict.target}: inconclusive: {text}" for verdict in unsure for text in verdict.doubts
    ]
    targets = f"{len(verdicts)} targets"
    if failed:
        head = f"VIOLATION in {len(failed)} of {targets}:"
    elif unsure:
        head = f"INCONCLUSIVE: the audit was too weak on {len(unsure)} of {targets}:"
    else:
        number = f"all {targets}" if len(verdicts) > 1 else "the target"
        head = f"pass: no violation found in {number}. This is evidence, not proof."
    return "\n".join([head, *([""] if lines else []), *lines])


def _deterministic(record: AuditRecord) -> Rows:
    """Return a row for each case, over all its combinations of allocation, bound and loss."""
    rows = [["target", "combinations", "pairs", "largest change", "replay", "verdict"]]
    groups: dict[str, list[Verdict]] = {}
    for found in record.asked:
        groups.setdefault(found.task.case or found.task.name, []).append(found.verdict)
    for name, verdicts in groups.items():
        neighbours = [verdict.neighbours for verdict in verdicts]
        replays = [verdict.replay for verdict in verdicts]
        differ = sum(bool(replay.violations) for replay in replays)
        rows.append(
            [
                name,
                str(len(verdicts)),
                str(sum(found.pairs for found in neighbours)),
                f"{max(found.ratio for found in neighbours):.4f}",
                f"{differ} differ" if differ else "same",
                _word(*neighbours, *replays),
            ]
        )
    return rows


def _epsilons(verdicts: Sequence[Verdict]) -> Rows:
    header = ["target", "steps", "trials", "mu", "bound", "tightness", "epsilon", "bound"]
    return [[*header, "verdict"]] + [
        [
            verdict.target,
            str(found.steps),
            str(found.trials),
            f"{found.mu:.3f}",
            f"{found.mu_lower:.3f}",
            f"{found.tightness:.2f}",
            f"{found.epsilon:.2f}",
            f"{found.epsilon_lower:.2f}",
            _word(found),
        ]
        for verdict in verdicts
        for found in verdict.empirical
    ]


def _noises(verdicts: Sequence[Verdict]) -> Rows:
    header = ["target", "batch", "draws", "scale", "p-value", "correlation", "verdict"]
    return [header] + [
        [
            verdict.target,
            law.batch.removeprefix("an ").removesuffix(" batch"),
            str(law.draws),
            f"{law.scale:.4f}",
            f"{law.p_value:.2g}",
            f"{max(value / limit for value, limit in law.correlations.values()):.2f}",
            _word(law),
        ]
        for verdict in verdicts
        for law in verdict.noise
    ]


def _word(*checks: Check) -> str:
    outcome = outcome_of(*checks)
    return "VIOLATION" if outcome == "violation" else outcome
