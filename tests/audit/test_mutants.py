"""Ways to be wrong, patched into the real engine and optimizer; with each of them the audit fails.

Few trials are enough: each of these is far off. Small errors in the noise's scale need the full
number, which `test_noise_law` tries on a mechanism that is cheaper to step.
"""

from __future__ import annotations

import pytest
import torch

from opacus_bpclip import BackpropClipOptimizer, BackpropClipping
from opacus_bpclip import hooks as grad_sample_module
from opacus_bpclip.audit import CASES, audit
from opacus_bpclip.clipping import allocation
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.rules import norms
from tests.budgets import layerwise
from tests.mutants import bounds, joint
from tests.mutants.registry import take_for_a_mean


def drawn(noise_of):
    """Replace what is added to each parameter's sum."""

    def mutant(patch):
        def add_noise(self):
            for index, p in enumerate(self.params):
                std = self.noise_multiplier * self.max_grad_norm
                p.grad = p.summed_grad + noise_of(self, p, index, std)
                p.summed_grad._processed = True

        patch.setattr(BackpropClipOptimizer, "add_noise", add_noise)

    mutant.__name__ = noise_of.__name__
    return mutant


def noise_shrunk(factor):
    def shrunk(self, p, index, std):
        return torch.randn_like(p) * std / factor

    shrunk.__name__ = f"noise_shrunk_by_{factor}"
    return drawn(shrunk)


@drawn
def divided_by_the_batch_size_again(self, p, index, std):
    """The withdrawn results."""
    return torch.randn_like(p) * std / self.expected_batch_size


@drawn
def sensitivity_squared(self, p, index, std):
    return torch.randn_like(p) * std * self.max_grad_norm


@drawn
def multiplier_squared(self, p, index, std):
    return torch.randn_like(p) * std * self.noise_multiplier


# torch fills tensors of 16 entries and more in another way, so that equal seeds give equal noise
# where sizes are alike: as in the case of branches.
@drawn
def one_seed_for_all_layers(self, p, index, std):
    if index == 0:
        self.seed = int(torch.randint(2**31, ()))
    generator = torch.Generator().manual_seed(self.seed)
    return torch.randn(p.shape, generator=generator) * std


@drawn
def one_seed_for_all_steps(self, p, index, std):
    generator = torch.Generator().manual_seed(index)
    return torch.randn(p.shape, generator=generator) * std


@drawn
def noise_in_bfloat16(self, p, index, std):
    return (torch.randn(p.shape, dtype=torch.bfloat16) * std).to(p)


@drawn
def no_noise_without_a_gradient(self, p, index, std):
    return torch.randn_like(p) * std * bool(p.summed_grad.any())


@drawn
def noise_scaled_to_the_gradient(self, p, index, std):
    return torch.randn_like(p) * std * p.summed_grad.norm().clamp(max=1)


def root_of_the_layers_lost(patch):
    """Every layer gets the whole sensitivity."""
    patch.setattr(
        grad_sample_module.allocation,
        "layer_fractions",
        lambda sizes, _: dict.fromkeys(sizes, 1.0),
    )


def mean_undone_after_clipping(patch):
    """The repaired reference code: g_i / |B| is clipped."""
    take = GradientGuard.take

    def mutant(self, parameter):
        gradient = take(self, parameter)
        return gradient if gradient is None else gradient * self._batch_size

    take_for_a_mean(patch, False)
    patch.setattr(GradientGuard, "take", mutant)


def bias_uncovered(patch):
    patch.setattr(norms, "column_norms", lambda input_norms, *, weight, bias: input_norms)


def embedding_positions_not_added_up(patch):
    def mutant(g, norms):
        return torch.linalg.vector_norm(g, dim=2).amax(dim=(1, 2))

    patch.setattr(norms, "weighted_bound", mutant)


def accounted_per_layer(patch):
    pre_step = BackpropClipOptimizer.pre_step

    def mutant(self, closure=None):
        done = pre_step(self, closure)
        for _ in list(self._hooks._groups)[1:]:
            self.step_hook(self)
        return done

    patch.setattr(BackpropClipOptimizer, "pre_step", mutant)


def empty_batches_skipped(patch):
    pre_step = BackpropClipOptimizer.pre_step

    def mutant(self, closure=None):
        if not self._hooks._guard._batch_size:
            self.zero_grad(set_to_none=True)
            return False
        return pre_step(self, closure)

    patch.setattr(BackpropClipOptimizer, "pre_step", mutant)


JOINT, LAYERWISE = BackpropClipping(), layerwise()

# The mutant, the case, how it clips, the trials that it takes, and what the verdict says.
MUTANTS = [
    (noise_shrunk(1.2), "linear", JOINT, 200, "does not follow its law: its scale is 0.8"),
    (noise_shrunk(32), "linear", JOINT, 200, "one step: mu is at least 2."),
    (divided_by_the_batch_size_again, "linear", JOINT, 100, "one step: mu is at least "),
    (sensitivity_squared, "linear", JOINT, 100, "does not follow its law: its scale is 0.7"),
    (multiplier_squared, "linear", JOINT, 100, "noise on an empty batch does not follow its law"),
    (one_seed_for_all_layers, "branches", JOINT, 100, "is correlated over parameters"),
    (one_seed_for_all_steps, "linear", JOINT, 100, "is correlated over steps"),
    (noise_in_bfloat16, "linear", JOINT, 100, "drawn in low precision"),
    (no_noise_without_a_gradient, "linear", JOINT, 0, "the same randomness gives other noise"),
    (noise_scaled_to_the_gradient, "linear", JOINT, 0, "the same randomness gives other noise"),
    (root_of_the_layers_lost, "branches", LAYERWISE, 0, "moves the sum by 2 times the claimed"),
    (mean_undone_after_clipping, "linear", JOINT, 0, "times the claimed sensitivity"),
    (mean_undone_after_clipping, "linear", LAYERWISE, 0, "times the claimed sensitivity"),
    (bias_uncovered, "linear", LAYERWISE, 0, "moves the sum by 1.05"),
    (embedding_positions_not_added_up, "embedding", LAYERWISE, 0, "moves the sum by 4 times"),
    (accounted_per_layer, "branches", JOINT, 0, "one step was accounted as 4 at noise multipl"),
    (empty_batches_skipped, "linear", JOINT, 0, "whether the step is skipped depends on the data"),
    (joint.one_layer_not_measured, "branches", JOINT, 0, "times the claimed sensitivity"),
    (joint.sums_made_before_all_is_measured, "branches", JOINT, 0, "times the claimed sensitivity"),
    (joint.first_use_taken_for_all, "shared", JOINT, 0, "times the claimed sensitivity"),
    (joint.tied_layers_measured_apart, "shared", JOINT, 0, "times the claimed sensitivity"),
    (joint.norms_over_the_batchs_mean, "branches", JOINT, 0, "times the claimed sensitivity"),
    (bounds.reuse_counted_once, "shared", LAYERWISE, 0, "times the claimed sensitivity"),
    (bounds.tied_layers_limited_apart, "shared", LAYERWISE, 0, "times the claimed sensitivity"),
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


def test_layer_fractions_are_where_the_mutant_patches_them():
    assert grad_sample_module.allocation is allocation
