"""The whole audit of one target, check after check."""

from __future__ import annotations

import torch

from opacus_bpclip.audit.cases import CASES
from opacus_bpclip.audit.empirical import Empirical, estimate
from opacus_bpclip.audit.neighbours import SEARCHES, NeighbourSearch
from opacus_bpclip.audit.noise_law import judge
from opacus_bpclip.audit.replay import replay
from opacus_bpclip.audit.settings import (
    ALPHA,
    DELTA,
    FEWEST_TRIALS,
    MAX_GRAD_NORM,
    TRIALS,
    Reduction,
)
from opacus_bpclip.audit.target import Batch, Target, empty
from opacus_bpclip.audit.trials import Trials, run_trials
from opacus_bpclip.audit.verdict import Verdict
from opacus_bpclip.config import BackpropClipping, is_positive_number

# A few trials of several steps: a tenth of the trials, 4 steps each. Their noise multiplier is
# another one, so that one which was squared or left out shows.
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
        alpha: chance of a faultless target to be convicted by chance, split evenly over all that is
            estimated.
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
        found = NeighbourSearch(target, seed=seed, searches=searches)
        replayed = replay(target, found.canary, noise_multiplier=noise_multiplier, seed=seed)
        verdict = Verdict(target.name, noise_multiplier, seed, alpha, found.result, replayed)
        if not trials:
            return verdict
        level = alpha / _ESTIMATES
        first = target.batches[0]

        def attacked(
            batch: Batch, count: int, steps: int, noise: float
        ) -> tuple[Trials, Empirical]:
            done = run_trials(
                target,
                batch,
                found.canary,
                noise_multiplier=noise,
                trials=count,
                steps=steps,
                seed=seed,
            )
            return done, estimate(
                done.without,
                done.with_canary,
                steps=steps,
                noise_multiplier=noise,
                gap=done.gap,
                alpha=level,
                delta=delta,
                expected=target.attained,
            )

        one, one_step = attacked(first, trials, 1, noise_multiplier)
        few = trials // _SHARE_OF_TRIALS
        several, some_steps = attacked(empty(first), few, _STEPS, _MORE_NOISE * noise_multiplier)

        return Verdict(
            target.name,
            noise_multiplier,
            seed,
            alpha,
            found.result,
            replayed,
            noise=(
                judge(one.noise, "an ordinary batch", level),
                judge(several.noise_without, "an empty batch", level),
            ),
            empirical=(one_step, some_steps),
        )


def audit_case(
    name: str,
    *,
    clipping: BackpropClipping | None = None,
    loss_reduction: Reduction = "mean",
    max_grad_norm: float = MAX_GRAD_NORM,
    noise_multiplier: float = 1.0,
    trials: int = TRIALS,
    alpha: float = ALPHA,
    delta: float = DELTA,
    seed: int = 0,
    searches: int = SEARCHES,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Audit one of the built-in cases through the package's own engine and optimizer.

    Args:
        name: one of `CASES`.
        clipping: the options.
        loss_reduction: ``"mean"`` or ``"sum"``.
        max_grad_norm: joint L2 sensitivity.
        noise_multiplier: as for `audit`; the following ones, too.
        trials: in each world.
        alpha: chance to be convicted by chance.
        delta: at which epsilon is compared.
        seed: of everything random.
        searches: made-up examples.
        device: where to train.

    Raises:
        KeyError: there is no such case.

    Examples:
        >>> audit_case("embedding", clipping=BackpropClipping.paper(), trials=0).violations
        ()
    """
    clipping = clipping or BackpropClipping()
    label = f"{name}, {clipping.allocation}, {clipping.bound}, {loss_reduction} loss"
    return audit(
        CASES[name].target(
            label,
            loss_reduction=loss_reduction,
            max_grad_norm=max_grad_norm,
            clipping=clipping,
            device=device,
        ),
        noise_multiplier=noise_multiplier,
        trials=trials,
        alpha=alpha,
        delta=delta,
        seed=seed,
        searches=searches,
    )
