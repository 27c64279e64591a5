"""The whole audit of one target, check after check."""

from __future__ import annotations

from dataclasses import replace

import torch

from opacus_bpclip.audit.empirical import estimate
from opacus_bpclip.audit.neighbours import SEARCHES, search
from opacus_bpclip.audit.noise_law import judge
from opacus_bpclip.audit.replay import replay
from opacus_bpclip.audit.settings import ALPHA, DELTA, FEWEST_TRIALS, TRIALS
from opacus_bpclip.audit.target import Target, empty
from opacus_bpclip.audit.trials import run_trials
from opacus_bpclip.audit.verdict import Verdict
from opacus_bpclip.config import is_positive_number

# A few trials of several steps: a tenth of the trials, 4 steps each. They have another noise
# multiplier, so that the audit sees one which was squared or left out.
_STEPS = 4
_SHARE_OF_TRIALS = 10
_MORE_NOISE = 2.0

# Estimates that may go wrong by chance: two rates of mistakes for one step and two for several, and
# three tests of the noise on each of two batches.
_ESTIMATES = 10


def audit(
    target: Target,
    *,
    noise_multiplier: float = 1.0,
    trials: int = TRIALS,
    alpha: float = ALPHA,
    delta: float = DELTA,
    seed: int = 0,
    searches: int = SEARCHES,
) -> Verdict:
    """Compare what a way of training does with what it claims.

    Four checks: neighbours without noise, the same randomness replayed, the noise's law, and the
    empirical epsilon; ``docs/audit.md`` says what each one means. A pass is evidence, not proof.

    Args:
        target: what is audited.
        noise_multiplier: claimed, above zero.
        trials: one-step trials in each of two worlds; 0 leaves the statistical checks out.
        alpha: chance of a faultless target to fail, split evenly over all that is estimated.
        delta: at which epsilon is compared.
        seed: of everything random; torch's global generator is put back afterwards.
        searches: made-up examples in the search for the worst neighbours.

    Returns:
        The verdict; ``verdict.violations`` is empty for a pass.

    Raises:
        ValueError: the noise multiplier is not above zero, or there are too few trials to judge by.

    Examples:
        >>> from opacus_bpclip.audit import CASES
        >>> audit(CASES["linear"].target("linear"), trials=0).outcome
        'pass'
    """
    if not is_positive_number(noise_multiplier):
        raise ValueError(f"Expected noise_multiplier={noise_multiplier!r} to be a number > 0.")
    if trials != 0 and trials < FEWEST_TRIALS:
        raise ValueError(f"Expected trials={trials!r} to be 0 or at least {FEWEST_TRIALS}.")
    with torch.random.fork_rng(devices=[]):
        found, canary = search(target, seed=seed, searches=searches)
        replayed = replay(target, canary, noise_multiplier=noise_multiplier, seed=seed)
        verdict = Verdict(target.name, noise_multiplier, seed, alpha, found, replayed)
        if not trials:
            return verdict
        ordinary, level = target.batches[0], alpha / _ESTIMATES
        laws, attacks = [], []
        few, more_noise = trials // _SHARE_OF_TRIALS, _MORE_NOISE * noise_multiplier
        for place, batch, count, steps, noise in (
            ("an ordinary batch", ordinary, trials, 1, noise_multiplier),
            ("an empty batch", empty(ordinary), few, _STEPS, more_noise),
        ):
            done = run_trials(
                target, batch, canary, noise_multiplier=noise, trials=count, steps=steps, seed=seed
            )
            laws.append(judge(done.noise, place, level))
            attacks.append(estimate(done, alpha=level, delta=delta, expected=target.attained))
    return replace(verdict, noise=tuple(laws), empirical=tuple(attacks))
