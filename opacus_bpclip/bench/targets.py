"""What the project holds itself to: the default options, in whole steps on one thread.

Limits are ratios to training the same model without privacy; besides, no mode of Opacus may be
faster or smaller in any case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from opacus_bpclip.bench.results import Comparison, Quantity
from opacus_bpclip.bench.settings import DEFAULT, OPACUS, CaseName

# The largest median ratios.
TARGETS: dict[CaseName, dict[tuple[str, Quantity], float]] = {
    "cnn26k": {(DEFAULT, "time"): 1.50, (DEFAULT, "memory"): 1.50},
    "resnet18-gn": {(DEFAULT, "time"): 1.50, (DEFAULT, "memory"): 1.30},
    "transformer": {
        (DEFAULT, "time"): 1.27,
        (DEFAULT, "memory"): 1.20,
        (f"{DEFAULT}-compiled", "time"): 1.20,
    },
    "mlp": {(DEFAULT, "time"): 1.30, (DEFAULT, "memory"): 1.10},
    "transformer-512": {(DEFAULT, "time"): 1.25},
}
# What the best of Opacus's modes in each quantity is called.
BEST: dict[Quantity, str] = {"time": "fastest", "memory": "smallest"}


class Verdict(NamedTuple):
    """One line of the acceptance table.

    Args:
        case: the case's name.
        arm: the arm.
        what: what is measured.
        measured: median; None if it was not measured or does not run.
        limit: the target.
        strict: whether the limit itself is too much.
    """

    case: str
    arm: str
    what: str
    measured: float | None
    limit: float
    strict: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if nothing was measured."""
        if self.measured is None:
            return None
        return self.measured < self.limit if self.strict else self.measured <= self.limit


def verdicts(comparison: Comparison) -> Iterator[Verdict]:
    """Yield the verdict on each target of a case; none for a growth curve's points."""
    name, median = comparison.point.name, comparison.median
    if comparison.point.axis is not None:
        return
    for (arm, quantity), limit in TARGETS.get(name, {}).items():
        yield Verdict(name, arm, quantity, median(quantity, arm), limit)
    for quantity, best in BEST.items():
        rival = comparison.best_of(quantity, OPACUS)
        if rival is not None:
            what = f"{quantity} against `{rival}`, Opacus's {best} mode"
            yield Verdict(name, DEFAULT, what, median(quantity, DEFAULT, rival), 1.0, strict=True)
