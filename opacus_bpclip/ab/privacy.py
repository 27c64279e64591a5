"""The noise multiplier and the epsilon after each epoch: one calculation for every private arm."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from opacus.accountants import create_accountant
from opacus.accountants.utils import get_noise_multiplier

from opacus_bpclip.ab.settings import Settings
from opacus_bpclip.jobs.errors import UsageError


def noise_multiplier_for(settings: Settings, sample_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier that Opacus's search finds for the target epsilon.

    What is spent in the end is never above the target, and up to 0.01 below it.

    Args:
        settings: the target and the accountant.
        sample_rate: chance of each example to enter a batch.
        steps: optimizer steps in all.

    Raises:
        UsageError: no noise multiplier reaches the target.
    """
    with domain_warning_silenced(settings.accountant):
        try:
            return get_noise_multiplier(
                target_epsilon=settings.epsilon,
                target_delta=settings.delta,
                sample_rate=sample_rate,
                steps=steps,
                accountant=settings.accountant,
            )
        except ValueError as error:
            raise UsageError(
                f"no noise multiplier reaches --epsilon {settings.epsilon:g} at --delta "
                f"{settings.delta:g} in {steps} steps ({error})"
            ) from error


def epsilon_spent(
    settings: Settings, noise_multiplier: float, sample_rate: float, steps: int
) -> float:
    """Return epsilon at the settings' delta after a number of optimizer steps."""
    accountant = create_accountant(mechanism=settings.accountant)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with domain_warning_silenced(settings.accountant):
        return float(accountant.get_epsilon(delta=settings.delta))


@contextmanager
def domain_warning_silenced(accountant: str) -> Iterator[None]:
    """Keep quiet a remark on RDP orders where RDP only sizes the PRV accountant's grid."""
    with warnings.catch_warnings():
        if accountant == "prv":
            warnings.filterwarnings("ignore", message="Optimal order is", category=UserWarning)
        yield
