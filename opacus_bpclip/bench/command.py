"""The subcommand ``opacus-bpclip bench``."""

from __future__ import annotations

from opacus_bpclip.bench.settings import BenchOutput, Settings
from opacus_bpclip.jobs.interrupts import ending_at_once


def bench(
    *,
    settings: Settings = Settings(),
    output: BenchOutput = BenchOutput(),
) -> int:
    """Compare the time and memory of training steps.

    Compare whole training steps: forward, loss, backward, clipping, noise, optimizer. Times are
    medians of ratios to training the same model without privacy, paired in interleaved rounds in
    one process; peak memory comes from a process for each arm. Nothing is downloaded.
    """
    with ending_at_once():
        from opacus_bpclip.bench.job import Bench
        from opacus_bpclip.jobs.running import run

    return run(Bench(settings, output), output)
