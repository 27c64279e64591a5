"""Steps that are not one mechanism."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

from opacus_bpclip import BackpropClipOptimizer
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.hooks import BackpropClipHooks
from tests.mutants import guard_killers, noise_killers
from tests.mutants.registry import mutant


@mutant(killed_by=noise_killers.accounting_of_physical_batches, says="steps for .* logical batches")
def physical_batches_as_steps(patch: pytest.MonkeyPatch) -> None:
    """Each physical batch of BatchMemoryManager is a step, on few examples, and the accountant
    counts each as another sample."""
    skip = BackpropClipOptimizer._check_skip_next_step

    def never(self: BackpropClipOptimizer, pop_next: bool = True) -> bool:
        skip(self, pop_next)
        return False

    patch.setattr(BackpropClipOptimizer, "_check_skip_next_step", never)


@mutant(killed_by=noise_killers.accounting_of_physical_batches, says="the accountant saw")
def physical_batches_accounted(patch: pytest.MonkeyPatch) -> None:
    """The accountant gets an entry for each physical batch, and so depends on the private number of
    examples in the logical one."""
    pre_step = BackpropClipOptimizer.pre_step

    def accounted(self: BackpropClipOptimizer, closure: None = None) -> bool:
        done = pre_step(self, closure)
        if not done:
            self.step_hook(self)
        return done

    patch.setattr(BackpropClipOptimizer, "pre_step", accounted)


@mutant(killed_by=noise_killers.accounting_of_empty_batches, says="the accountant saw")
def empty_batches_skipped(patch: pytest.MonkeyPatch) -> None:
    """There is no step for an empty Poisson batch, so the number of steps depends on the data."""
    step = BackpropClipOptimizer.step

    def skipping(self: BackpropClipOptimizer, closure: None = None) -> None:
        if self._hooks._guard._batch_size:
            step(self, closure)
        for p in self.params:
            p.grad = p.new_zeros(p.shape)

    patch.setattr(BackpropClipOptimizer, "step", skipping)


@mutant(killed_by=noise_killers.divisor, says="not divided by a public constant")
def private_divisor(patch: pytest.MonkeyPatch) -> None:
    """The released sum is divided by the size of its own batch, which is private: one more example
    changes the scale of all contributions, and of the noise."""

    def scale_grad(self: BackpropClipOptimizer) -> None:
        for p in self.params:
            p.grad /= max(1, self._hooks._guard._batch_size)

    patch.setattr(BackpropClipOptimizer, "scale_grad", scale_grad)


@mutant(killed_by=guard_killers.frozen_within_a_logical_batch, says="more than the sum of its own")
def sums_of_what_is_frozen_kept(patch: pytest.MonkeyPatch) -> None:
    """The sum of a parameter that is frozen within a logical batch waits for a later sample, whose
    noise it gets, too."""

    def of_what_trains(self: BackpropClipOptimizer, kept: object = ()) -> None:
        for p in () if kept else self._summed:
            p.summed_grad = None

    patch.setattr(BackpropClipOptimizer, "_drop_sums", of_what_trains)


@mutant(killed_by=guard_killers.gradient_set_by_hand, says="was put into a sum")
def gradients_taken_at_the_step(patch: pytest.MonkeyPatch) -> None:
    """The gradient in `p.grad` at the step is released as the sum, wherever it came from."""
    take = GradientGuard.take

    def from_grad(self: GradientGuard, parameter: nn.Parameter) -> Tensor | None:
        collected = take(self, parameter)
        return collected if parameter.grad is None else parameter.grad

    patch.setattr(GradientGuard, "take", from_grad)


@mutant(killed_by=guard_killers.two_batches_in_one_step, says="nothing bounds was released")
def two_poisson_batches_in_one_step(patch: pytest.MonkeyPatch) -> None:
    """Two Poisson batches add up before a step: an example that is in both contributes twice."""
    patch.setattr(BackpropClipHooks, "forbid_grad_accumulation", lambda self: None)
