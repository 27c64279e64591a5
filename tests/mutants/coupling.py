"""Contributions that depend on other examples, or that are not clipped gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import hooks as grad_sample_module
from opacus_bpclip.clipping import at_once, factors, fused, fused_use, layers, node, use
from opacus_bpclip.clipping.factors import Measured
from opacus_bpclip.clipping.fused_use import FusedUse
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.guard.parameters import GuardedParameters
from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.rules import ConvRule, GroupNormRule, LinearRule, base
from tests.mutants import bound_killers, coupling_killers, guard_killers
from tests.mutants.registry import mutant, take_for_a_mean


@mutant(killed_by=bound_killers.below_the_clip, says=r"(\(root\)|joint): .* > 1\.0")
@mutant(
    killed_by=coupling_killers.hostile_batch_together_and_alone, says="together and alone differ"
)
def mean_never_undone(patch: pytest.MonkeyPatch) -> None:
    """The gradient of a mean is clipped: one more example shrinks the gradients of all others."""
    take_for_a_mean(patch, False)


@mutant(killed_by=bound_killers.below_the_clip, says=r"(\(root\)|joint): .* > 1\.0")
def mean_undone_after_clipping(patch: pytest.MonkeyPatch) -> None:
    """The repaired reference code: the gradient of a mean is clipped, and multiplied by the batch
    size afterwards. One example can move the sum by almost twice the limit."""
    mean_never_undone(patch)
    take = GradientGuard.take

    def undone(self: GradientGuard, parameter: nn.Parameter) -> Tensor | None:
        gradient = take(self, parameter)
        return gradient if gradient is None else gradient * self._batch_size

    patch.setattr(GradientGuard, "take", undone)


@mutant(killed_by=coupling_killers.two_layers_together_and_alone, says="together and alone differ")
def mean_undone_in_every_layer_anew(patch: pytest.MonkeyPatch) -> None:
    """The gradient that goes on to the layers below is not divided again, so it depends on the
    batch's private size."""
    arrive = Scope.arrive

    def undivided(self: Scope, use: Use) -> tuple[Tensor | None, ...]:
        gradients = arrive(self, use)
        return tuple(dx if dx is None else dx * use.examples for dx in gradients)

    patch.setattr(Scope, "arrive", undivided)


@mutant(killed_by=coupling_killers.two_layers_together_and_alone, says="together and alone differ")
def weights_not_multiplied_back(patch: pytest.MonkeyPatch) -> None:
    """A linear layer clips as if the loss were a sum, but returns the gradient of a mean."""
    gradients = LinearRule.gradients

    def divided(self: LinearRule, *args: Any, multiplier: int, **options: Any) -> Any:
        return gradients(self, *args, multiplier=1, **options)

    patch.setattr(LinearRule, "gradients", divided)


@mutant(
    killed_by=coupling_killers.hostile_batch_together_and_alone, says="together and alone differ"
)
def one_factor_for_the_batch(patch: pytest.MonkeyPatch) -> None:
    """All examples are scaled by the factor of the largest: one example changes the contributions
    of the others."""
    measure = FusedUse.measure_by_bound

    def largest(self: FusedUse) -> Measured:
        found = measure(self)
        bound = found.bound
        return found._replace(bound=bound.amax().expand_as(bound) if len(bound) else bound)

    patch.setattr(FusedUse, "measure_by_bound", largest)


@mutant(killed_by=coupling_killers.group_norm_together_and_alone, says="together and alone differ")
def examples_channels_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """A group norm's kernel returns the gradients of all examples' channels in one row. If the row
    is cut wrongly, each piece is clipped as one example's and has parts of several."""
    gradients = GroupNormRule.gradients

    def transposed(self: GroupNormRule, *args: Any, **options: Any) -> tuple[Any, Tensor]:
        dx, own = gradients(self, *args, **options)
        return dx, own.T.reshape(own.shape)

    patch.setattr(GroupNormRule, "gradients", transposed)


@mutant(killed_by=coupling_killers.convolution_together_and_alone, says="together and alone differ")
def examples_kernels_mixed_up(patch: pytest.MonkeyPatch) -> None:
    """A convolution's kernel gets examples as groups of channels, and returns their gradients in
    one row. If the row is cut wrongly, each piece has parts of several examples."""
    gradients = ConvRule.own_gradients

    def transposed(self: ConvRule, *args: Any) -> Tensor:
        found = gradients(self, *args)
        return found.flatten(1).T.reshape(found.shape)

    patch.setattr(ConvRule, "own_gradients", transposed)


@mutant(
    killed_by=coupling_killers.group_norm_far_from_zero_together_and_alone,
    says="together and alone differ",
)
def means_left_in_normalisations_kernels(patch: pytest.MonkeyPatch) -> None:
    """A group norm's backward kernel subtracts the mean's part after it has added up. A large mean
    leaves rounding errors, which change with the batch size of a mean loss."""
    gradients = GroupNormRule.gradients

    def cancelling(
        self: GroupNormRule, g: Tensor, x: Tensor, weight: Tensor, **options: Any
    ) -> tuple[Any, Tensor]:
        dx, own = gradients(self, g, x, weight, **options)
        flat = x.view(len(x), self.groups, -1)
        mean = flat.mean(dim=2).repeat_interleave(self.channels // self.groups, dim=1)
        rstd = torch.rsqrt(flat.var(dim=2, correction=0) + self.eps)
        rstd = rstd.repeat_interleave(self.channels // self.groups, dim=1)
        own[:, : self.channels] = ((g * x).sum(dim=2) - mean * g.sum(dim=2)) * rstd
        return dx, own

    patch.setattr(GroupNormRule, "gradients", cancelling)


@mutant(
    killed_by=coupling_killers.frozen_norm_far_from_zero_together_and_alone,
    says="together and alone differ",
)
def frozen_normalisations_left_to_autograd(patch: pytest.MonkeyPatch) -> None:
    """A frozen normalisation's kernel subtracts `mean * sum g` from `sum g x`, and the layers below
    clip the rounding errors of the difference."""
    patch.setattr(grad_sample_module, "frozen_normalizations", lambda *_: ())


@mutant(killed_by=coupling_killers.input_not_finite, says="the sum is not finite")
@mutant(killed_by=coupling_killers.upstream_not_finite, says="the sum is not finite")
def nan_passed_through(patch: pytest.MonkeyPatch) -> None:
    """An example that is not finite is added to the sum, and the gradient of the whole batch is
    nan."""
    for module in (at_once, factors, use, fused, fused_use, layers, base):
        patch.setattr(module, "zero_rows", lambda x, keep: x)


@mutant(killed_by=coupling_killers.upstream_of_a_sequence_not_finite, says="the sum is not finite")
def nan_in_own_gradients_passed_through(patch: pytest.MonkeyPatch) -> None:
    """A per-example gradient that is not finite is added up with factor zero, which gives nan."""
    for module in (at_once, fused_use):
        patch.setattr(module, "zero_rows", lambda x, keep: x)


@mutant(killed_by=guard_killers.weight_beside_its_layer, says="nothing bounds was released")
@mutant(
    killed_by=guard_killers.weight_beside_its_layer_after_a_good_batch,
    says="nothing bounds was released",
)
def sources_not_asked_for(patch: pytest.MonkeyPatch) -> None:
    """Any gradient that arrives at a parameter through autograd is collected, as `p.grad` does by
    default; the layers' sums are handed over in another way."""

    def collect(self: WatchedParameter, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.add(gradient)

    patch.setattr(WatchedParameter, "_arrive", collect)


@mutant(killed_by=guard_killers.layer_added_later, says="nothing bounds was released")
def new_parameters_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    """A layer that the model gets after `make_private` trains with raw gradients."""
    patch.setattr(GuardedParameters, "unexamined", lambda _: None)


@mutant(killed_by=guard_killers.gradient_there_before, says="nothing bounds was released")
def sums_collected_unseen(patch: pytest.MonkeyPatch) -> None:
    """The layers' sums are collected without a check that the gradient was empty before."""

    def collect(self: GradientGuard, _: object, sums: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, total in sums.items():
            self.parameters[parameter].add(total)
        self.passes.collected = self.passes.count

    patch.setattr(GradientGuard, "_collect", collect)


@mutant(killed_by=guard_killers.one_batch_backward_twice, says="nothing bounds was released")
def calls_contribute_twice(patch: pytest.MonkeyPatch) -> None:
    """Backward passes through one call of a layer are not counted: each adds another contribution
    of every example."""
    backward = node._Node.backward

    def unspent(ctx: Any, g: Tensor) -> Any:
        ctx.spent = False
        return backward(ctx, g)

    patch.setattr(node._Node, "backward", staticmethod(unspent))
    scopes_end_any_number_of_times(patch)


@mutant(killed_by=guard_killers.heads_backward_apart, says="nothing bounds was released")
def scopes_end_any_number_of_times(patch: pytest.MonkeyPatch) -> None:
    """Each backward pass through a part of one forward pass gets the whole joint budget, also if
    another part has spent it."""
    finish = Scope.finish

    def again(self: Scope) -> dict[nn.Parameter, Tensor]:
        self._ended = False
        return finish(self)

    patch.setattr(Scope, "finish", again)


@mutant(killed_by=guard_killers.statistics_of_a_pass_without_gradients, says="were taken up")
def statistics_not_looked_at_without_gradients(patch: pytest.MonkeyPatch) -> None:
    """A batch normalisation takes up the statistics of private examples in a pass without
    gradients, and later passes use them."""
    patch.setattr(grad_sample_module, "watch_statistics", lambda model: [])
