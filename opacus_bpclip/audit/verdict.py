"""What an audit of one target comes to, and how it becomes JSON and comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opacus_bpclip.audit.empirical import Empirical, Histogram
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

    def as_dict(self) -> dict[str, Any]:
        """Return every fact, as JSON knows them."""
        return {
            "outcome": self.outcome,
            "violations": list(self.violations),
            "doubts": list(self.doubts),
            **_strict(asdict(self)),
        }


def verdict_from_dict(record: Mapping[str, Any]) -> Verdict:
    """Return the verdict that `Verdict.as_dict` wrote.

    Raises:
        KeyError, TypeError: the record has another shape.
    """
    record = {name: _number(value) for name, value in record.items()}
    replay = record["replay"]
    return Verdict(
        target=record["target"],
        noise_multiplier=record["noise_multiplier"],
        seed=record["seed"],
        alpha=record["alpha"],
        neighbours=Neighbours(**record["neighbours"]),
        replay=Replay(replay["pairs"], replay["draws"], tuple(replay["differences"])),
        noise=tuple(
            NoiseLaw(**{**law, "correlation_limit": tuple(law["correlation_limit"])})
            for law in record["noise"]
        ),
        empirical=tuple(
            Empirical(**{**found, "histogram": _histogram(found["histogram"])})
            for found in record["empirical"]
        ),
    )


def _histogram(record: Mapping[str, Any]) -> Histogram:
    return Histogram(
        record["low"], record["high"], tuple(record["without"]), tuple(record["with_canary"])
    )


def _strict(value: Any) -> Any:
    """Return the same with numbers that strict JSON does not know as text."""
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> Any:
    """Undo `_strict`."""
    if isinstance(value, dict):
        return {name: _number(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_number(part) for part in value]
    return float(value) if value in ("inf", "-inf", "nan") else value
