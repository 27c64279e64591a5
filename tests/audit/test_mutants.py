"""Ways to be wrong, patched into the real engine and optimizer; with each of them the audit fails.

`tests/test_mutants.py` audits the mutants of the noise in the same way. Small errors in the noise's
scale need the full number of trials, which `test_noise_law` tries on noise without an engine.
"""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip import BackpropClipping
from opacus_bpclip.audit import CASES, audit
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.rules import norms
from tests.budgets import layerwise
from tests.mutants import bounds, joint, noise, release
from tests.mutants.noise import scale_noise
from tests.mutants.registry import take_for_a_mean


def noise_shrunk(factor):
    def mutant(patch):
        scale_noise(patch, lambda own: 1 / factor)

    mutant.__name__ = f"noise_shrunk_by_{factor}"
    return mutant


def multiplier_squared(patch):
    scale_noise(patch, lambda own: own.noise_multiplier)


def noise_scaled_to_the_gradient(patch):
    def norm(own):
        return float(torch.cat([p.summed_grad.flatten() for p in own.params]).norm())

    scale_noise(patch, lambda own: min(1.0, norm(own)))


def mean_undone_after_clipping(patch):
    """The repaired reference code: g_i / |B| is clipped."""
    take = GradientGuard.take

    def mutant(self, parameter):
        gradient = take(self, parameter)
        return gradient if gradient is None else gradient * self._batch_size

    take_for_a_mean(patch, False)
    patch.setattr(GradientGuard, "take", mutant)


def embedding_positions_not_added_up(patch):
    def mutant(g, norms):
        return torch.linalg.vector_norm(g, dim=2).amax(dim=(1, 2))

    patch.setattr(norms, "weighted_bound", mutant)


JOINT, LAYERWISE = BackpropClipping(), layerwise()
MOVED = "times the claimed sensitivity"

# The mutant, the case, how it clips, the trials that it takes, and what the verdict says.
MUTANTS = [
    (noise_shrunk(1.2), "linear", JOINT, 200, "does not follow its law: its scale is 0.8"),
    (noise_shrunk(32), "linear", JOINT, 200, "one step: mu is at least 2."),
    (multiplier_squared, "linear", JOINT, 100, "noise on an empty batch does not follow its law"),
    (noise_scaled_to_the_gradient, "linear", JOINT, 0, "the same randomness gives other noise"),
    (noise.layers_as_separate_steps, "branches", LAYERWISE, 0, "one step was accounted as 4 at "),
    (release.empty_batches_skipped, "linear", JOINT, 0, "the random calls depend on the data"),
    (mean_undone_after_clipping, "linear", JOINT, 0, MOVED),
    (mean_undone_after_clipping, "linear", LAYERWISE, 0, MOVED),
    (embedding_positions_not_added_up, "embedding", LAYERWISE, 0, "moves the sum by 4 times"),
    (bounds.sqrt_of_the_layers_lost, "branches", LAYERWISE, 0, "moves the sum by 2 times the cl"),
    (bounds.bias_uncovered_by_columns, "linear", LAYERWISE, 0, "moves the sum by 1.05"),
    (bounds.reuse_counted_once, "shared", LAYERWISE, 0, MOVED),
    (bounds.tied_layers_limited_apart, "shared", LAYERWISE, 0, MOVED),
    (joint.one_layer_not_measured, "branches", JOINT, 0, MOVED),
    (joint.sums_made_before_all_is_measured, "branches", JOINT, 0, MOVED),
    (joint.first_use_taken_for_all, "shared", JOINT, 0, MOVED),
    (joint.tied_layers_measured_apart, "shared", JOINT, 0, MOVED),
    (joint.norms_over_the_batchs_mean, "branches", JOINT, 0, MOVED),
    (joint.margins_of_uses_multiplied, "tied-embedding", JOINT, 0, MOVED),
]


@pytest.mark.parametrize(
    ("mutant", "case", "clipping", "trials", "text"),
    MUTANTS,
    ids=[f"{m[0].__name__}-{m[2].allocation}" for m in MUTANTS],
)
def test_the_audit_of_a_mutant_fails(mutant, case, clipping, trials, text, monkeypatch):
    mutant(monkeypatch)
    verdict = audit(CASES[case].target(case, clipping=clipping), trials=trials, searches=0)
    assert verdict.outcome == "violation"
    assert any(text in violation for violation in verdict.violations), verdict.violations


# Each audit that a mutant fails, with the most trials that it takes there.
AUDITS = {
    (case, clipping.allocation): (clipping, trials)
    for _, case, clipping, trials, _ in sorted(MUTANTS, key=lambda mutant: mutant[3])
}


@pytest.mark.parametrize("audited", AUDITS, ids="-".join)
def test_the_real_code_passes_the_same_audits(audited):
    (case, _), (clipping, trials) = audited, AUDITS[audited]
    verdict = audit(CASES[case].target(case, clipping=clipping), trials=trials, searches=0)
    assert (verdict.violations, verdict.outcome) == ((), "pass")
