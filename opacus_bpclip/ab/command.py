"""The subcommand ``opacus-bpclip ab``."""

from __future__ import annotations

from opacus_bpclip.ab.settings import ComparisonOutput, Settings
from opacus_bpclip.jobs.interrupts import ending_at_once


def ab(
    *,
    settings: Settings = Settings(),
    output: ComparisonOutput = ComparisonOutput(),
) -> int:
    """Compare clipping methods at equal privacy.

    Train one model by several clipping methods on equal terms: same initial weights, same Poisson
    batches, same noise multiplier, same accountant. Prints accuracy, epsilon, time per step and
    peak memory of each arm, and plots accuracy over epsilon. Without options: scikit-learn's
    digits, up to three minutes, nothing downloaded. With --model and --data: a model and data of
    your own; arms that cannot train it are listed with the reason. Exit status: 0 all arms were
    trained or listed before training, 1 one failed in training, 2 wrong usage, or no private arm
    can train the model.
    """
    with ending_at_once():
        from opacus_bpclip.ab.job import Comparison
        from opacus_bpclip.jobs.running import run

    return run(Comparison(settings, progress=output.progress), output)
