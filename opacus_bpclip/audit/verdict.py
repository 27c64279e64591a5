"""What an audit of one target comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from opacus_bpclip.audit.empirical import Empirical
from opacus_bpclip.audit.neighbours import Neighbours
from opacus_bpclip.audit.noise_law import NoiseLaw
from opacus_bpclip.audit.replay import Replay

Outcome = Literal["pass", "violation", "asleep"]


@dataclass(frozen=True)
class Verdict:
    """The result of `audit`.

    Attributes:
        target: what was audited.
        noise_multiplier: claimed.
        seed: of everything random.
        alpha: chance of a faultless target to be convicted by the statistical checks.
        neighbours: the measured sensitivity.
        replay: what differed under the same randomness.
        noise: the noise's law, on each batch; empty without the statistical checks.
        empirical: the empirical epsilon, for one and for several steps; likewise.
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
    def violations(self) -> tuple[str, ...]:
        """Say what breaks the claim, in one line each; empty for a pass."""
        found = [*self.neighbours.violations, *self.replay.violations]
        found += [text for law in self.noise for text in law.violations]
        found += [text for attack in self.empirical for text in attack.violations]
        return tuple(found)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Say why a pass would mean little, in one line each."""
        found = [*self.neighbours.doubts]
        found += [text for law in self.noise for text in law.doubts]
        found += [text for attack in self.empirical for text in attack.doubts]
        return tuple(found)

    @property
    def outcome(self) -> Outcome:
        """Return ``"violation"``, ``"pass"``, or ``"asleep"``: a violation might go unnoticed."""
        if self.violations:
            return "violation"
        return "asleep" if self.doubts else "pass"

    @property
    def is_statistical(self) -> bool:
        """Whether the noise and the empirical epsilon were judged."""
        return bool(self.empirical)
