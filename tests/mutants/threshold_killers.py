"""Killers of mutants of moving thresholds and of noise scaled by layer."""

from __future__ import annotations

import torch
from torch import nn

from opacus_bpclip import AdaptiveThreshold, BackpropClipping
from opacus_bpclip import audit as audits
from tests.checks import HUGE
from tests.mutants.bound_killers import Sides
from tests.thresholds.helpers import Pinned, SideBySide, check_one_mechanism


def _one(clipping: BackpropClipping, *thresholds: float) -> None:
    """Check what one example moves that is far above every threshold."""
    trainer = Pinned(SideBySide(nn.Linear(1, 1), nn.Linear(1, 9)), (1,), clipping)
    trainer.put(*thresholds)
    x = torch.full((1, 1), HUGE).double()
    check_one_mechanism(trainer, x, torch.full_like(trainer.plain(x), HUGE))


def far_above_a_joint_threshold() -> None:
    """One example far above a threshold of 2, with a joint budget and a sensitivity of 1."""
    _one(BackpropClipping(threshold=AdaptiveThreshold(count_noise=0.6)), 2.0)


def far_above_the_thresholds_of_layers() -> None:
    """One example far above the thresholds of two layers, with their noise scaled."""
    clipping = BackpropClipping(
        allocation="equal", threshold=AdaptiveThreshold(count_noise=0.6), layer_noise="dimension"
    )
    _one(clipping, 0.5, 3.0)


def far_above_thresholds_with_equal_noise() -> None:
    """One example far above the thresholds of two layers, with the same noise in both."""
    clipping = BackpropClipping(allocation="equal", threshold=AdaptiveThreshold(count_noise=0.6))
    _one(clipping, 0.5, 3.0)


def counted_in_two_uses() -> None:
    """One example far below the threshold of a layer that is used twice."""
    clipping = BackpropClipping(
        allocation="equal", uses={"layer": 2}, threshold=AdaptiveThreshold(count_noise=0.51)
    )
    trainer = Pinned(Sides(), (1,), clipping)
    x = torch.full((1, 1), 1e-3).double()
    check_one_mechanism(trainer, x, torch.full_like(trainer.plain(x), 1e-3))


def many_beside_one() -> None:
    """A batch of examples far above the threshold, and one more."""
    trainer = Pinned(
        SideBySide(nn.Linear(1, 1), nn.Linear(1, 9)),
        (1,),
        BackpropClipping(threshold=AdaptiveThreshold()),
    )
    x = torch.full((9, 1), HUGE).double()
    check_one_mechanism(trainer, x, torch.full((9, 10), HUGE).double())


def noise_of_layers_and_counts() -> None:
    """The statistical audit of four layers side by side with moving thresholds and scaled noise,
    100 trials in each world."""
    clipping = BackpropClipping(
        allocation="equal",
        threshold=AdaptiveThreshold(),
        layer_noise="dimension",
        max_input_norm=3.0,
    )
    target = audits.CASES["branches"].target("branches", loss_reduction="sum", clipping=clipping)
    verdict = audits.audit(target, trials=100, searches=0)
    assert verdict.outcome == "pass", f"the audit says: {'; '.join(verdict.violations)}"
