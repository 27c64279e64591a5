"""One budget for all layers, measured or spent wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from opacus_bpclip.clipping import scope, together
from opacus_bpclip.clipping.factors import Factors, Measured, Target
from opacus_bpclip.clipping.fused_use import FusedUse
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.sensitivities import Sensitivities
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.passes import BackwardPasses
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Bound
from tests.mutants import joint_killers as killers
from tests.mutants.registry import MOVED, mutant

JOINT = "joint" + MOVED
APART = "together and alone differ"


@mutant(killed_by=killers.two_layers_in_one_budget, says=JOINT)
def one_layer_not_measured(patch: pytest.MonkeyPatch) -> None:
    """One layer is left out of the examples' norms, and is scaled by a factor from the other layers
    only."""
    clip_kept = Scope._clip_kept

    def without(self: Scope) -> None:
        group, found = next(iter(self._found.items()))
        self._found[group] = found._replace(bound=found.bound * 0)
        clip_kept(self)

    patch.setattr(Scope, "_clip_kept", without)


@mutant(killed_by=killers.two_layers_in_one_budget, says=JOINT)
def sums_made_before_all_is_measured(patch: pytest.MonkeyPatch) -> None:
    """Each layer's sum is made as soon as its gradient arrives, with a factor from the layers
    measured so far."""
    arrive = Scope.arrive

    def early(self: Scope, use: Use) -> tuple[Tensor | None, ...]:
        inputs = arrive(self, use)
        found = dict(self._found)
        self._clip_kept()
        self._found = found
        return inputs

    patch.setattr(Scope, "arrive", early)


@mutant(killed_by=killers.small_gradients_normalised, says=JOINT)
def factor_applied_twice(patch: pytest.MonkeyPatch) -> None:
    """An example's gradient is scaled twice. Where small gradients are scaled up, the result is far
    above the limit."""
    factors = Scope._factors

    def twice(self: Scope, found: Measured, use: Use) -> Factors:
        once = factors(self, found, use)
        return once._replace(factor=once.factor * once.factor * use.examples)

    patch.setattr(Scope, "_factors", twice)


@mutant(killed_by=killers.two_uses_in_one_budget, says=JOINT)
def first_use_taken_for_all(patch: pytest.MonkeyPatch) -> None:
    """Of a layer that is used twice only one use is measured, but both are added up."""

    def first(uses: Sequence[Use], bound: Bound, *, mean: bool) -> Measured:
        return uses[0].measure()

    patch.setattr(scope, "merged", lambda uses: uses)
    patch.setattr(scope, "measure_together", first)


@mutant(killed_by=killers.tied_layers_in_one_budget, says=JOINT)
def tied_layers_measured_apart(patch: pytest.MonkeyPatch) -> None:
    """The gradients of layers that share a weight are measured separately and their squares are
    added up, as if they could not point the same way."""
    enter = Scope.enter

    def apart(self: Scope, layer: Layer, group: str) -> None:
        enter(self, layer, layer.name)

    patch.setattr(Scope, "enter", apart)


@mutant(killed_by=killers.small_batch_before_a_large_one, says=JOINT)
def norms_of_the_batch_before(patch: pytest.MonkeyPatch) -> None:
    """The factors are computed from the examples' norms in the batch before."""
    factors = Scope._factors
    seen: list[tuple[Scope, Measured]] = []

    def stale(self: Scope, found: Measured, use: Use) -> Factors:
        if not seen or seen[-1][0] is not self:
            seen.append((self, found))
        before = seen[-2][1] if len(seen) > 1 else found
        alike = len(before.bound) == len(found.bound)
        return factors(self, before if alike else found, use)

    patch.setattr(Scope, "_factors", stale)


@mutant(killed_by=killers.large_gradients_of_a_tied_embedding, says=APART)
def margins_of_uses_multiplied(patch: pytest.MonkeyPatch) -> None:
    """The margin for rounding errors is the product of the norms of all uses' positions. It has an
    upstream gradient in both factors, so it grows with the square, and does not scale with n."""
    patch.setattr(together, "exact_bound", partial(_without_uses, together.exact_bound))


def _without_uses(bound: Callable[..., Tensor], *args: Any, uses: object, **options: Any) -> Tensor:
    return bound(*args, **options)


@mutant(killed_by=killers.large_and_small_together_and_alone, says=APART)
def norms_over_the_batchs_mean(patch: pytest.MonkeyPatch) -> None:
    """An example's norm is relative to the batch's mean, so the other examples change its
    contribution."""
    factors = Scope._factors

    def relative(self: Scope, found: Measured, use: Use) -> Factors:
        return factors(self, found._replace(bound=found.bound / found.bound.mean()), use)

    patch.setattr(Scope, "_factors", relative)


@mutant(killed_by=killers.large_and_small_together_and_alone, says=APART)
def norms_over_the_batchs_largest(patch: pytest.MonkeyPatch) -> None:
    """All examples are scaled by the factor of the batch's largest gradient."""
    factors = Scope._factors

    def largest(self: Scope, found: Measured, use: Use) -> Factors:
        each = found.bound
        return factors(self, found._replace(bound=each.amax().expand_as(each)), use)

    patch.setattr(Scope, "_factors", largest)


@mutant(killed_by=killers.one_layer_not_finite, says="moved the sum by")
def example_kept_where_it_is_finite(patch: pytest.MonkeyPatch) -> None:
    """An example that is not finite in one layer contributes to the other layers, although its norm
    is unknown."""

    def own(self: Scope, total: Measured, use: Use, shared: object) -> Factors:
        return self._factors(use.measure(), use)

    patch.setattr(Scope, "_shared_factors", own)


@mutant(killed_by=killers.rounding_normalised, says=APART)
def stability_left_out(patch: pytest.MonkeyPatch) -> None:
    """A gradient that consists of rounding errors is scaled up to the limit, and it changes with
    the batch size of a mean loss."""
    target_of = Sensitivities._target

    def bare(self: Sensitivities, config: BackpropClipping, name: str) -> Target:
        return target_of(self, config, name)._replace(stability=0.0)

    patch.setattr(Sensitivities, "_target", bare)


@mutant(killed_by=killers.sequences_of_several_lengths, says=APART)
def packed_rows_not_put_in_order(patch: pytest.MonkeyPatch) -> None:
    """Packed sequences are sorted by length and not put back in order: a recurrent network's row is
    another example than the same row of the other layers."""
    patch.setattr(FusedUse, "in_order", lambda self: self)


@mutant(
    killed_by=killers.gradient_changed_after_it_was_measured, says="nothing bounds was released"
)
def kept_gradients_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    """A gradient that is kept between measuring and adding up is not checked for changes: a hook
    can change it in place."""
    patch.setattr(FusedUse, "has_changed", lambda self: False)


@mutant(killed_by=killers.two_compiled_forward_passes, says="nothing bounds was released")
def compiled_forward_passes_not_counted(patch: pytest.MonkeyPatch) -> None:
    """The forward passes of a compiled graph in one backward pass are not counted: each spends the
    whole budget on the same examples."""
    patch.setattr(BackwardPasses, "begin_traced", lambda self, forwards: None)
