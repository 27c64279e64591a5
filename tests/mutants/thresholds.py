"""Moving thresholds and noise scaled by layer."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from opacus_bpclip.clipping import factors, scope
from opacus_bpclip.clipping.factors import Measured, Target
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.sensitivities import Sensitivities
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.optimizer import optimizer
from opacus_bpclip.optimizer import scales as noise
from opacus_bpclip.optimizer.scales import Scales
from tests.mutants import threshold_killers as killers
from tests.mutants.registry import mutant

MOVED = r"moved by \d.* > 1 unit"


@mutant(killed_by=killers.far_above_a_joint_threshold, says=MOVED)
def gradients_left_at_the_threshold(patch: pytest.MonkeyPatch) -> None:
    """Gradients are clipped to the threshold and not multiplied to the limit, which the noise is
    for."""
    patch.setattr(Target, "at_hand", lambda self: (self.norms.tolist()[1],) * 2)


@mutant(killed_by=killers.far_above_the_thresholds_of_layers, says=MOVED)
def counts_not_clamped(patch: pytest.MonkeyPatch) -> None:
    """An example counts by how far it is above the threshold, without an end."""

    def count(found: Measured, target: Target, *, examples: int = 1, present: Any = None) -> Tensor:
        return ((1 - found.bound.double() * examples / target.at_hand()[1]) / 0.2).sum()

    patch.setattr(scope, "centred_count", count)


@mutant(killed_by=killers.counted_in_two_uses, says=MOVED)
def uses_counted_apart(patch: pytest.MonkeyPatch) -> None:
    """Each use of a layer counts as a whole example."""
    count = factors.centred_count

    def whole(found: Measured, target: Target, **options: Any) -> Tensor:
        return count(found, target._replace(uses=1), **options)

    patch.setattr(scope, "centred_count", whole)


@mutant(killed_by=killers.far_above_a_joint_threshold, says=MOVED)
def counts_not_paid_for(patch: pytest.MonkeyPatch) -> None:
    """The gradient's noise does not grow although the counts are released beside it."""
    scales = noise.scales

    def free(noise_multiplier: float, *args: Any, **options: Any) -> Scales:
        paid = scales(noise_multiplier, *args, **options)
        return scales(noise_multiplier, *args, **options | {"counts": 0})._replace(
            counts=paid.counts
        )

    patch.setattr(noise, "scales", free)


@mutant(killed_by=killers.many_beside_one, says=MOVED)
def threshold_of_the_same_step(patch: pytest.MonkeyPatch) -> None:
    """A step's counts move the threshold of the same step: an example changes how others are
    clipped, by counts that have no noise yet."""
    count = Scope._count

    def ahead(self: Scope, found: Measured, use: Use, rows: slice) -> None:
        count(self, found, use, rows)
        within = float(self._sums[self.target.tally])  # type: ignore[index]
        self.target.norms[1] *= 2.0**-within
        self.target.norms[0] *= 2.0**-within

    patch.setattr(Scope, "_count", ahead)


@mutant(killed_by=killers.far_above_the_thresholds_of_layers, says=MOVED)
def noise_of_layers_not_together(patch: pytest.MonkeyPatch) -> None:
    """Each layer has noise for its own sensitivity: the layers are released as if they were of
    different samples."""
    scales = noise.scales

    def apart(noise_multiplier: float, sensitivities: Any, **options: Any) -> Scales:
        own = scales(noise_multiplier, sensitivities, **options)
        return own._replace(layers={n: noise_multiplier * d for n, d in sensitivities.items()})

    patch.setattr(noise, "scales", apart)


@mutant(killed_by=killers.far_above_thresholds_with_equal_noise, says=MOVED)
def every_layer_has_the_whole(patch: pytest.MonkeyPatch) -> None:
    """The sensitivities are the thresholds relative to the largest, not to the norm of all."""

    def parts(self: Sensitivities) -> dict[str, float]:
        largest = max(self._values.values())
        return {name: value / largest * self.max_grad_norm for name, value in self._values.items()}

    patch.setattr(Sensitivities, "all", property(parts))


@mutant(killed_by=killers.noise_of_layers_and_counts, says="does not follow its law")
def counts_without_noise(patch: pytest.MonkeyPatch) -> None:
    """The counts are used as they are: the next thresholds tell who was in the batch."""
    noise_of = noise.noise_of

    def silent(own: Sensitivities, noise_multiplier: float, max_grad_norm: float) -> Any:
        stds = noise_of(own, noise_multiplier, max_grad_norm)
        return stds | dict.fromkeys(own.counts.values(), 0.0)

    patch.setattr(optimizer, "noise_of", silent)
