"""The audit of whitened gradients: neighbours, replay, noise and the empirical epsilon."""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip import BackpropClipping, InputWhitening
from opacus_bpclip.audit import CASES, audit


@pytest.mark.parametrize("allocation", ["joint", "dimension"])
@pytest.mark.parametrize("case", ["linear", "sequence-linear", "conv", "branches"])
def test_whitened_gradients_pass(case: str, allocation: str) -> None:
    shape = CASES[case].inputs
    generator = torch.Generator().manual_seed(0)
    public = torch.randn(16, *shape, generator=generator) * torch.linspace(1, 0.01, shape[-1])
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        whitening=InputWhitening(lambda _: public, power=0.5, every=2),
    )
    target = CASES[case].target(case, clipping=clipping, loss_reduction="sum")
    # In one of them with as many trials as a law of the noise and an attacker need at least.
    trials = 500 if (case, allocation) == ("branches", "joint") else 0
    verdict = audit(target, trials=trials, searches=20)
    assert (verdict.violations, verdict.doubts) == ((), ())
