"""Wrong noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip import BackpropClipOptimizer
from opacus_bpclip.optimizer import noise, optimizer
from tests.mutants import noise_killers as killers
from tests.mutants.registry import mutant


def scale_noise(
    patch: pytest.MonkeyPatch, factor: Callable[[BackpropClipOptimizer], float]
) -> None:
    """Make each step's noise larger or smaller by a factor."""
    add_noise = BackpropClipOptimizer.add_noise

    def scaled(self: BackpropClipOptimizer) -> None:
        noise_multiplier = self.noise_multiplier
        self.noise_multiplier = noise_multiplier * factor(self)
        add_noise(self)
        self.noise_multiplier = noise_multiplier

    patch.setattr(BackpropClipOptimizer, "add_noise", scaled)


@mutant(killed_by=killers.noise_scale, says="times as wide")
@mutant(killed_by=killers.audit, says="the audit says: .*mu is at least")
def original_bug(patch: pytest.MonkeyPatch) -> None:
    """The withdrawn results: the sensitivity is divided by the batch size once more, so the noise
    is too small by the batch's number of examples."""
    scale_noise(patch, lambda own: 1 / own.expected_batch_size)


@mutant(killed_by=killers.noise_scale, says="times as wide")
@mutant(killed_by=killers.audit, says="the audit says: .*does not follow its law")
def delta_squared_for_delta(patch: pytest.MonkeyPatch) -> None:
    """The noise is scaled by `max_grad_norm` squared, which is too little where that is below 1."""
    scale_noise(patch, lambda own: own.max_grad_norm)


@mutant(killed_by=killers.noise_scale, says="times as wide")
@mutant(killed_by=killers.accounting, says="the accountant saw")
@mutant(killed_by=killers.audit_of_branches, says="the audit says: .*does not follow its law")
def layers_as_separate_steps(patch: pytest.MonkeyPatch) -> None:
    """The repaired reference code: each layer is a separate step, with noise for its own
    sensitivity. The accountant counts L samples where there was one, and a central-limit accountant
    then claims an epsilon of 3 where it is 23.6."""

    def add_noise(self: BackpropClipOptimizer) -> None:
        sensitivities = self.layer_sensitivities
        for name, group in self._hooks._groups.items():
            std = self.noise_multiplier * sensitivities[name]
            for p in group.parameters:
                drawn = torch.randn(p.shape, generator=self.generator, dtype=p.dtype)
                p.grad = p.summed_grad + std * drawn
                p.summed_grad._processed = True

    pre_step = BackpropClipOptimizer.pre_step

    def accounted(self: BackpropClipOptimizer, closure: None = None) -> bool:
        done = pre_step(self, closure)
        for _ in list(self.layer_sensitivities)[1:]:
            self.step_hook(self)
        return done

    patch.setattr(BackpropClipOptimizer, "add_noise", add_noise)
    patch.setattr(BackpropClipOptimizer, "pre_step", accounted)


@mutant(killed_by=killers.fresh_noise, says="drawn twice")
@mutant(killed_by=killers.audit_of_branches, says="the audit says: .*correlated over parameters")
def one_seed_for_all_layers(patch: pytest.MonkeyPatch) -> None:
    """Every layer's noise starts from the same state of the generator, so it cancels in the
    difference of two layers' gradients."""

    def anew(sums: Sequence[Tensor], *, generator: torch.Generator | None, **options: Any) -> None:
        source = generator or torch.default_generator
        state = source.get_state()
        for one in sums:
            source.set_state(state)
            noise.add_noise_([one], generator=generator, **options)

    patch.setattr(optimizer, "add_noise_", anew)


@mutant(killed_by=killers.fresh_noise, says="drawn twice")
@mutant(killed_by=killers.audit, says="the audit says: .*correlated over steps")
def same_noise_in_every_step(patch: pytest.MonkeyPatch) -> None:
    """The generator's state is restored after each step, so the noise cancels in the difference of
    two steps."""
    add_noise = BackpropClipOptimizer.add_noise

    def set_back(self: BackpropClipOptimizer) -> None:
        source = self.generator or torch.default_generator
        state = source.get_state()
        add_noise(self)
        source.set_state(state)

    patch.setattr(BackpropClipOptimizer, "add_noise", set_back)


@mutant(killed_by=killers.fresh_noise, says="(drawn twice|lower precision)")
@mutant(killed_by=killers.audit, says="the audit says: .*low precision")
def noise_in_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """The noise is drawn in bfloat16: it has only coarse values, and the finer digits of the
    release are the sum's own."""
    draw = noise._noise

    def coarse(*args: Any, **options: Any) -> Tensor:
        drawn = draw(*args, **options)
        return drawn.to(torch.bfloat16).to(drawn.dtype)

    patch.setattr(noise, "_noise", coarse)


@mutant(killed_by=killers.noise_scale, says="noise 0.0 times as wide")
@mutant(killed_by=killers.noise_of_an_empty_batch, says="noise 0.0 times as wide")
@mutant(killed_by=killers.audit, says="the audit says: .*gives other noise")
def no_noise_without_a_gradient(patch: pytest.MonkeyPatch) -> None:
    """A parameter whose sum is zero gets no noise, which reveals that no example of the batch
    changed it, or that the batch is empty."""
    add_noise = BackpropClipOptimizer.add_noise

    def where_needed(self: BackpropClipOptimizer) -> None:
        silent = [p for p in self.params if not p.summed_grad.any()]
        add_noise(self)
        for p in silent:
            p.grad.zero_()

    patch.setattr(BackpropClipOptimizer, "add_noise", where_needed)


def _many_small_streams(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(noise, "_DRAW", 2)
    patch.setattr(noise, "_DRAWS", 1)


@mutant(killed_by=killers.fresh_noise_of_streams, says="drawn twice")
@mutant(killed_by=killers.audit, says="the audit says: .*correlated over parameters")
def two_streams_with_one_seed(patch: pytest.MonkeyPatch) -> None:
    """The streams of a large model's noise begin in the same state, so the noise cancels in the
    difference of two parts of the gradient."""
    made = noise.streams

    def equal(generator: torch.Generator, count: int) -> list[torch.Generator]:
        first, *others = made(generator, count)
        return [first, *(others[0].clone_state() for _ in others)]

    patch.setattr(noise, "streams", equal)
    _many_small_streams(patch)


@mutant(killed_by=killers.fresh_noise_of_streams, says="drawn twice")
@mutant(killed_by=killers.audit, says="the audit says: .*correlated over steps")
def streams_seeded_by_their_number(patch: pytest.MonkeyPatch) -> None:
    """A stream is seeded only by its number, and so begins in the same state in every step."""

    def numbered(generator: torch.Generator, count: int) -> list[torch.Generator]:
        return [generator, *(torch.Generator().manual_seed(i) for i in range(1, count))]

    patch.setattr(noise, "streams", numbered)
    _many_small_streams(patch)
