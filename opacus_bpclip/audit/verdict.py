"""What an audit of one target comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opacus_bpclip.audit.empirical import Empirical
from opacus_bpclip.audit.neighbours import Neighbours
from opacus_bpclip.audit.noise_law import NoiseLaw
from opacus_bpclip.audit.replay import Replay

Check = Neighbours | Replay | NoiseLaw | Empirical
Outcome = Literal["pass", "violation", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """The result of `audit`.

    Attributes:
        target: what was audited.
        noise_multiplier: claimed.
        seed: of everything random.
        alpha: chance of a faultless target to fail the statistical checks.
        neighbours: the measured sensitivity.
        replay: the comparison of neighbours under the same randomness.
        noise: the noise's law, on each batch; empty without the statistical checks.
        empirical: the empirical epsilon, for one and for several steps; empty without them.
    """

    target: str
    noise_multiplier: float
    seed: int
    alpha: float
    neighbours: Neighbours
    replay: Replay
    noise: tuple[NoiseLaw, ...] = ()
    empirical: tuple[Empirical, ...] = ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks that were made."""
        return self.neighbours, self.replay, *self.noise, *self.empirical

    @property
    def violations(self) -> tuple[str, ...]:
        """What breaks the claim, in one line each; empty for a pass."""
        return tuple(text for check in self.checks for text in check.violations)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why a pass would mean little, in one line each."""
        return tuple(text for check in self.checks for text in check.doubts)

    @property
    def outcome(self) -> Outcome:
        """``"violation"``, ``"pass"``, or ``"inconclusive"``: a violation might go unnoticed."""
        return outcome_of(self)


def outcome_of(*checks: Check | Verdict) -> Outcome:
    """Return what some checks come to together."""
    if any(check.violations for check in checks):
        return "violation"
    return "inconclusive" if any(check.doubts for check in checks) else "pass"
