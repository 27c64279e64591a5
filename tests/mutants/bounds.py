"""Bounds and limits that are too small or too large."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_bpclip import hooks as grad_sample_module
from opacus_bpclip.clipping import fused, parameters, recurrent, sensitivities, use
from opacus_bpclip.clipping.factors import Factors, Measured
from opacus_bpclip.clipping.fused_use import FusedUse
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.sensitivities import Sensitivities
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.use import Clipped, FactorsOf, OwnUse, Use
from opacus_bpclip.model.tying import Group
from opacus_bpclip.rules import (
    ConvRule,
    EmbeddingRule,
    FusedRule,
    LayerNormRule,
    LinearRule,
    exact_norms,
    matrix,
    norms,
)
from tests.mutants import bound_killers as killers
from tests.mutants.registry import MOVED, clipped_around_the_layer, mutant


@mutant(killed_by=killers.two_layers_at_their_limits, says="joint" + MOVED)
def sqrt_of_the_layers_lost(patch: pytest.MonkeyPatch) -> None:
    """Every one of L layers gets the whole of `max_grad_norm`: together they move by sqrt(L) times
    what the noise is for."""
    patch.setattr(sensitivities, "layer_fractions", lambda sizes, _: dict.fromkeys(sizes, 1.0))


@mutant(killed_by=killers.two_layers_after_a_new_limit, says=MOVED)
def layers_not_told_of_a_new_limit(patch: pytest.MonkeyPatch) -> None:
    """A scheduler lowers `max_grad_norm`, and with it the noise; the layers still clip to the old
    limit."""
    put = Sensitivities.set
    told: weakref.WeakSet[Sensitivities] = weakref.WeakSet()

    def once(self: Sensitivities, value: float) -> None:
        if self in told:
            self.max_grad_norm = value
        else:
            told.add(self)
            put(self, value)

    patch.setattr(Sensitivities, "set", once)


@mutant(killed_by=killers.product_with_bias, says=MOVED)
def bias_uncovered_by_product(patch: pytest.MonkeyPatch) -> None:
    """The product bound leaves out the column of ones that the bias appends to the input."""
    patch.setattr(norms, "max_column_norm", lambda max_norm, *, weight, bias: max_norm)


@mutant(killed_by=killers.weighted_with_bias, says=MOVED)
def bias_uncovered_by_columns(patch: pytest.MonkeyPatch) -> None:
    """The columns' norms leave out the 1 that the bias appends to each."""
    patch.setattr(norms, "column_norms", lambda input_norms, *, weight, bias: input_norms)


@mutant(killed_by=killers.exact_with_bias, says=MOVED)
def bias_uncovered_by_exact(patch: pytest.MonkeyPatch) -> None:
    """The exact bound is the norm of the weight's gradient, without the bias's."""
    exact = exact_norms.exact_bound

    def without(*arguments: Tensor, bias: bool, **options: Any) -> Any:
        return exact(*arguments, bias=False, **options)

    patch.setattr(exact_norms, "exact_bound", without)


@mutant(killed_by=killers.own_gradients_with_bias, says=MOVED)
def bias_uncovered_by_own_gradients(patch: pytest.MonkeyPatch) -> None:
    """Where per-example gradients are made, only the weight's gradient is measured."""
    bound = FusedRule.bound_of_own

    def without(self: FusedRule, *arguments: Tensor) -> Tensor:
        return bound(replace(self, bias=False), *arguments)

    patch.setattr(FusedRule, "bound_of_own", without)


@mutant(killed_by=killers.input_above_the_clip, says=MOVED)
def input_not_clipped(patch: pytest.MonkeyPatch) -> None:
    """The product bound assumes inputs of norm `max_input_norm`, and the input is not clipped."""
    patch.setattr(LinearRule, "clip_factor", lambda self, norms, *_: torch.ones_like(norms))


@mutant(killed_by=killers.input_above_the_clip, says=MOVED)
def input_clip_claimed_and_not_made(patch: pytest.MonkeyPatch) -> None:
    """The norms are those of a clipped input, but neither the output nor the gradient is scaled."""
    measured = fused.FusedClip.measured

    def claimed(self: fused.FusedClip, x: Tensor) -> Any:
        return measured(self, x)._replace(factor=None)

    patch.setattr(fused.FusedClip, "measured", claimed)


@mutant(killed_by=killers.repeated_token_by_product, says=MOVED)
def largest_position_for_all(patch: pytest.MonkeyPatch) -> None:
    """The product bound takes the largest position's norm instead of the sum over positions."""

    def largest(g: Tensor, column: float, *_: Any) -> Tensor:
        return torch.linalg.vector_norm(g, dim=2).amax(dim=(1, 2)) * column

    patch.setattr(norms, "product_bound", largest)


@mutant(killed_by=killers.long_sequence, says=MOVED)
def positions_added_up_in_squares(patch: pytest.MonkeyPatch) -> None:
    """The weighted bound adds up squares of positions, as if they could not point the same way."""

    def squares(g: Tensor, columns: Tensor, *_: Any) -> Tensor:
        return torch.linalg.vector_norm(g * columns[:, :, None], dim=(1, 2, 3))

    patch.setattr(norms, "weighted_bound", squares)


@mutant(killed_by=killers.reflected_pixel, says=MOVED)
def reflect_padding_ignored(patch: pytest.MonkeyPatch) -> None:
    """Patches are measured as if the border were padded with zeros; reflection puts pixels into
    them a second time."""

    def zeros(self: ConvRule, x: Tensor) -> Tensor:
        return F.pad(x, self.padding) if any(self.padding) else x

    patch.setattr(ConvRule, "_pad", zeros)


@mutant(killed_by=killers.second_group, says=MOVED)
def groups_ignored(patch: pytest.MonkeyPatch) -> None:
    """A grouped convolution's patches are measured in the first group only."""
    measure = ConvRule.measure

    def first(self: ConvRule, x: Tensor) -> matrix.Measured:
        own = measure(self, x)
        return own._replace(norms=own.norms[:, :1].expand_as(own.norms))

    patch.setattr(ConvRule, "measure", first)


@mutant(killed_by=killers.two_groups, says=MOVED)
def groups_not_added_up(patch: pytest.MonkeyPatch) -> None:
    """The largest group's bound stands for all, though each group has a block of its own."""
    weighted = norms.weighted_bound

    def largest(g: Tensor, columns: Tensor, *_: Any) -> Tensor:
        groups = [weighted(g[:, [r]], columns[:, [r]]) for r in range(g.shape[1])]
        return torch.stack(groups).amax(dim=0)

    patch.setattr(norms, "weighted_bound", largest)


@mutant(killed_by=killers.repeated_token_by_exact, says=MOVED)
def embedding_row_repeated(patch: pytest.MonkeyPatch) -> None:
    """The exact bound treats each position of an embedding as a separate row; the positions of one
    token add up in one row."""

    def apart(self: EmbeddingRule, g: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.linalg.vector_norm(g, dim=(1, 2))

    patch.setattr(EmbeddingRule, "_exact_bound", apart)


@mutant(killed_by=killers.normalised_spike, says=MOVED)
def normalised_values_ignored(patch: pytest.MonkeyPatch) -> None:
    """The affine map of a normalisation is bounded like a bias: its weight's gradient has no bound,
    since normalised values can be large."""
    clipped_around_the_layer(patch)
    patch.setattr(LayerNormRule, "normalized", lambda self, x: torch.zeros_like(x))


@mutant(killed_by=killers.normalised_spike, says=MOVED)
def affine_weight_not_measured(patch: pytest.MonkeyPatch) -> None:
    """Of a normalisation's gradient, only the bias's part is measured."""
    row_norms = use.row_norms
    patch.setattr(use, "row_norms", lambda own: row_norms(own[:, own.shape[1] // 2 :]))


@mutant(killed_by=killers.layer_norm_far_from_zero, says=MOVED)
def means_left_in_normalised_layers(patch: pytest.MonkeyPatch) -> None:
    """A mean far above the deviations stays in the layer's input. The normalised values are then
    rounding errors, for which the bounds do not hold."""
    clipped_around_the_layer(patch)
    patch.setattr(LayerNormRule, "centred", lambda self, x: x)


@mutant(killed_by=killers.two_uses, says=MOVED)
def reuse_counted_once(patch: pytest.MonkeyPatch) -> None:
    """Each use of a layer gets the whole of its limit, though their contributions add up."""
    patch.setattr(sensitivities, "norm_of_each_use", lambda norm, uses: norm)


@mutant(killed_by=killers.tied_layers, says=MOVED)
def tied_layers_limited_apart(patch: pytest.MonkeyPatch) -> None:
    """Layers that share a weight have a limit each, whose squares are added up, though their
    contributions to the weight can point the same way."""

    def apart(layers: Any) -> dict[str, Group]:
        return {name: Group(name, (layer,)) for name, layer in layers.items()}

    patch.setattr(grad_sample_module, "tied_groups", apart)


@mutant(killed_by=killers.steps_that_agree, says=MOVED)
def time_steps_limited_apart(patch: pytest.MonkeyPatch) -> None:
    """Each time step of a recurrent network is clipped to the whole limit, though their
    contributions add up."""

    def apart(step: recurrent._Step) -> Scope:
        return step.budget.scope_of(step.target, at_once=True)

    patch.setattr(recurrent._Step, "scope", apart)


@mutant(killed_by=killers.two_raw_parameters, says=MOVED)
def raw_parameters_limited_apart(patch: pytest.MonkeyPatch) -> None:
    """The bound of a module's own parameters counts only the first one's gradient."""

    class First(OwnUse):
        def measure(self) -> Measured:
            whole, self._own = self._own, self._own[:, : self._own.shape[1] // len(self._names)]
            found = super().measure()
            self._own = whole
            return found

    patch.setattr(parameters, "OwnUse", First)


@mutant(killed_by=killers.vanishing_columns, says=MOVED)
def vanishing_squares_taken_for_zero(patch: pytest.MonkeyPatch) -> None:
    """Squares underflow, so norms become zero: tiny inputs count as zero, and their product with a
    large gradient is not clipped."""
    patch.setattr(norms, "smallest_column", lambda dtype: 0.0)
    patch.setattr(norms, "underflow", lambda count, dtype: 0.0)


@mutant(killed_by=killers.below_the_clip, says=MOVED)
def upstream_clipped_after_use(patch: pytest.MonkeyPatch) -> None:
    """The layer's gradient is made from the unclipped upstream gradient; only the gradient that
    goes on to the layers below is clipped."""

    def after_use(self: FusedUse, factors_of: FactorsOf) -> Clipped:
        factors = factors_of(self.measure())
        whole = Factors(torch.ones_like(factors.factor), factors.keep)
        return Clipped(self.sums(whole), self.input_gradients(factors))

    patch.setattr(FusedUse, "clip", after_use)


@mutant(killed_by=killers.below_the_clip_of_one_layer, says=MOVED)
def unclipped_here_and_below(patch: pytest.MonkeyPatch) -> None:
    """A layer that is to pass its gradient on unclipped does not clip its own, either."""
    clip_here = Scope._clip

    def clip(self: Scope, use: Use) -> Clipped:
        if self.propagate == "clipped":
            return clip_here(self, use)
        found = use.measure()
        whole = Factors(torch.ones_like(found.bound), found.usable)
        return Clipped(use.sums(whole), use.input_gradients(None))

    patch.setattr(Scope, "_clip", clip)


@mutant(killed_by=killers.buffer_filled_anew, says=MOVED)
def measurement_kept_for_the_next_batch(patch: pytest.MonkeyPatch) -> None:
    """The measurement of an input is kept as long as the tensor is the same object, even if its
    memory has another batch."""
    of = SharedMeasurement.of
    patch.setattr(
        SharedMeasurement, "of", lambda self, x, how, _, measure: of(self, x, how, 0, measure)
    )
