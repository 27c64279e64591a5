"""The subcommand ``opacus-bpclip audit``."""

from __future__ import annotations

from opacus_bpclip.audit.settings import AuditOutput, Settings
from opacus_bpclip.jobs.interrupts import ending_at_once


def audit(
    *,
    settings: Settings = Settings(),
    output: AuditOutput = AuditOutput(),
) -> int:
    """Measure sensitivity, noise and epsilon against what is claimed.

    Measure what private training does, and compare it with its claim: how far one example moves the
    noise-free sum, whether anything random depends on the data, the noise's law, and the smallest
    epsilon that an attacker's success allows. Without options: every built-in case, in some
    minutes. Exit status: 0 pass, 1 violation, 2 wrong usage, 3 no violation, but the audit was too
    weak.
    """
    with ending_at_once():
        from opacus_bpclip.audit.job import Audit
        from opacus_bpclip.jobs.running import run

    return run(Audit(settings, processes=output.processes, plot=output.plot), output)
