"""Rules of single layers that measure, count or clip the wrong thing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.model import coverage
from opacus_bpclip.probe import functions
from opacus_bpclip.rules import (
    BilinearRule,
    ConvTransposeRule,
    EmbeddingBagRule,
    PReLURule,
    SequenceBiasRule,
    TransposedLinearRule,
    norms,
)
from opacus_bpclip.rules.base import Inputs, Prepared
from tests.mutants import layer_killers as killers
from tests.mutants.registry import MOVED, mutant

# What `_nothing_refused` says when the guard finds the batch on another axis than the rule does.
REFUSED = "refused: {layer} got an input of shape .* its first axis must be the batch"


@mutant(killed_by=killers.repeated_token_of_a_bag, says="layer" + MOVED)
def tokens_of_a_bag_taken_for_different_ones(patch: pytest.MonkeyPatch) -> None:
    """The squares of a bag's tokens are added up, as if each token were another row; equal tokens
    add up in one row."""

    def apart(self: EmbeddingBagRule, bags: Any, dtype: torch.dtype) -> Tensor:
        weights = torch.ones(len(bags.ids), dtype=dtype)
        if bags.weights is not None:
            weights = bags.weights.to(dtype)
        squares = torch.zeros(bags.number, dtype=dtype).index_add(0, bags.bag, weights.square())
        return squares.sqrt()

    patch.setattr(EmbeddingBagRule, "_column_norms", apart)


@mutant(killed_by=killers.mean_of_a_bag, says="layer" + MOVED)
def mean_of_a_bag_divided_twice(patch: pytest.MonkeyPatch) -> None:
    """The norms of a bag that is a mean are divided by its size a second time: the bound is too
    small by the bag's number of tokens."""
    column_norms = EmbeddingBagRule._column_norms

    def divided(self: EmbeddingBagRule, bags: Any, dtype: torch.dtype) -> Tensor:
        ones = torch.ones(len(bags.ids), dtype=dtype)
        sizes = torch.zeros(bags.number, dtype=dtype).index_add(0, bags.bag, ones)
        return column_norms(self, bags, dtype) / sizes

    patch.setattr(EmbeddingBagRule, "_column_norms", divided)


@mutant(killed_by=killers.mean_of_a_bag_with_padding, says="layer" + MOVED)
def padding_counted_in_the_mean(patch: pytest.MonkeyPatch) -> None:
    """Padding counts as a token of the mean, although the layer leaves it out: the other tokens'
    weights are assumed to be too small."""
    column_norms = EmbeddingBagRule._column_norms

    def counted(self: EmbeddingBagRule, *args: Any) -> Tensor:
        return column_norms(dataclasses.replace(self, padding_idx=None), *args)

    patch.setattr(EmbeddingBagRule, "_column_norms", counted)


@mutant(killed_by=killers.weights_of_a_bag, says="layer" + MOVED)
def weights_of_a_bag_ignored(patch: pytest.MonkeyPatch) -> None:
    """Every token of a bag has weight one in the bound, although weights have no limit."""
    column_norms = EmbeddingBagRule._column_norms

    def unweighted(self: EmbeddingBagRule, bags: Any, dtype: torch.dtype) -> Tensor:
        return column_norms(self, bags._replace(weights=None), dtype)

    patch.setattr(EmbeddingBagRule, "_column_norms", unweighted)


@mutant(killed_by=killers.bags_of_several_lengths, says="layer" + MOVED)
def bags_taken_for_equally_long(patch: pytest.MonkeyPatch) -> None:
    """The tokens are divided evenly among the bags, without regard to the offsets: a long bag is
    measured by its neighbours' tokens."""
    read = EmbeddingBagRule._bags

    def even(self: EmbeddingBagRule, inputs: Inputs) -> Any:
        bags = read(self, inputs)
        each = -(-len(bags.ids) // max(bags.number, 1))
        return bags._replace(bag=torch.arange(len(bags.ids)) // max(each, 1))

    patch.setattr(EmbeddingBagRule, "_bags", even)


@mutant(killed_by=killers.weight_of_a_bag_that_is_not_finite, says="the sum is not finite")
def weights_that_are_not_finite_let_in(patch: pytest.MonkeyPatch) -> None:
    """A bag's weights are not checked: one nan makes the whole sum nan."""
    prepare = EmbeddingBagRule.prepare

    def trusting(self: EmbeddingBagRule, inputs: Inputs, max_norm: float | None) -> Prepared:
        prepared = prepare(self, inputs, max_norm)
        return prepared._replace(finite=torch.ones_like(prepared.finite))

    patch.setattr(EmbeddingBagRule, "prepare", trusting)


@mutant(killed_by=killers.many_equal_tokens, says=r"\(root\): 1\.000\d+ > 1\.0")
def additions_taken_for_exact(patch: pytest.MonkeyPatch) -> None:
    """Sums are treated as exact, though every addition rounds: over a long sequence the errors may
    all have one sign and exceed the bound."""
    patch.setattr(norms, "accumulation", lambda positions, dtype: 1)


@mutant(killed_by=killers.transposed_convolution, says=MOVED)
def patches_not_added_up(patch: pytest.MonkeyPatch) -> None:
    """A transposed convolution is bounded by its largest pixel's patch, though all patches add up
    in one weight."""

    def largest(g: Tensor, columns: Tensor, *_: Any) -> Tensor:
        return torch.linalg.vector_norm(g.abs().amax(3) * columns.amax(2)[..., None], dim=(1, 2))

    patch.setattr(norms, "weighted_bound", largest)


@mutant(killed_by=killers.transposed_convolution_with_bias, says=MOVED)
def output_bias_uncovered(patch: pytest.MonkeyPatch) -> None:
    """The bias of a transposed convolution is left out of its bound."""
    for name in ("_sum_of_bias", "_norm_of_bias"):
        patch.setattr(ConvTransposeRule, name, lambda self, g: g.new_zeros(len(g)))


@mutant(killed_by=killers.transposed_convolution_with_bias, says=MOVED)
def output_bias_taken_for_a_part_of_the_columns(patch: pytest.MonkeyPatch) -> None:
    """The bias is counted once for each patch, as in a convolution; here it is added at every
    position of the output."""

    def one_patch(self: ConvTransposeRule, g: Tensor) -> Tensor:
        return norms.weighted_bound(self.upstream(g)[..., :1], torch.ones(len(g), self.groups, 1))

    for name in ("_sum_of_bias", "_norm_of_bias"):
        patch.setattr(ConvTransposeRule, name, one_patch)


@mutant(killed_by=killers.transposed_convolution_with_padding, says=MOVED)
def patches_without_padding(patch: pytest.MonkeyPatch) -> None:
    """A transposed convolution's patches begin at the border of the output instead of the border
    before its padding was cut off: each pixel is measured with another pixel's patch."""
    aligned = ConvTransposeRule._aligned

    def from_the_border(self: ConvTransposeRule, g: Tensor, x: Tensor) -> Tensor:
        return aligned(dataclasses.replace(self, padding=(0,) * len(self.padding)), g, x)

    patch.setattr(ConvTransposeRule, "_aligned", from_the_border)


@mutant(killed_by=killers.transposed_convolution_in_groups, says=MOVED)
def pixels_clipped_by_one_group(patch: pytest.MonkeyPatch) -> None:
    """The first group's factor clips the pixels of all groups: those of another group stay above
    the norm that the product bound assumes."""
    clip_factor = ConvTransposeRule.clip_factor

    def first(self: ConvTransposeRule, columns: Tensor, max_norm: float, x: Tensor) -> Tensor:
        return clip_factor(self, columns[:, :1], max_norm, x).expand_as(columns)

    patch.setattr(ConvTransposeRule, "clip_factor", first)


@mutant(killed_by=killers.pairs_by_product, says="layer" + MOVED)
def each_input_clipped_to_the_whole_norm(patch: pytest.MonkeyPatch) -> None:
    """Each input of a bilinear layer is clipped to the limit of their product, which then may have
    the limit's square as its norm."""
    prepare = BilinearRule.prepare

    def whole(self: BilinearRule, inputs: Inputs, max_norm: float | None) -> Prepared:
        return prepare(self, inputs, max_norm and max_norm**2)

    patch.setattr(BilinearRule, "prepare", whole)


@mutant(killed_by=killers.pairs_by_weighted, says="layer" + MOVED)
def one_input_measured(patch: pytest.MonkeyPatch) -> None:
    """A bilinear layer's columns are measured by its first input only; the second may multiply them
    by any number."""
    prepare = BilinearRule.prepare

    def first(self: BilinearRule, inputs: Inputs, max_norm: float | None) -> Prepared:
        one, other = inputs
        prepared = prepare(self, inputs, max_norm)
        alone = prepare(self, (one, torch.ones_like(other)), max_norm)
        return prepared._replace(norms=alone.norms / 2)

    patch.setattr(BilinearRule, "prepare", first)


@mutant(killed_by=killers.negative_inputs_by_exact, says=MOVED)
@mutant(killed_by=killers.negative_inputs_by_weighted, says=MOVED)
def positive_inputs_taken_for_negative(patch: pytest.MonkeyPatch) -> None:
    """A slope is bounded by the inputs that it does not multiply."""
    parts = PReLURule._parts

    def mirrored(self: PReLURule, g: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        (x,) = inputs
        return parts(self, g, (-x,))

    patch.setattr(PReLURule, "_parts", mirrored)


@mutant(killed_by=killers.negative_inputs_by_exact, says=MOVED)
@mutant(killed_by=killers.negative_inputs_by_weighted, says=MOVED)
def positions_of_a_slope_not_added_up(patch: pytest.MonkeyPatch) -> None:
    """The squares of one slope's positions are added up, as if each position had another slope."""
    by_slope = PReLURule._by_slope

    def apart(self: PReLURule, x: Tensor) -> Tensor:
        return by_slope(self, x).transpose(1, 2)

    patch.setattr(PReLURule, "_by_slope", apart)


@mutant(killed_by=killers.added_token, says="layer" + MOVED)
def first_token_taken_for_the_added_one(patch: pytest.MonkeyPatch) -> None:
    """The bias that is appended as one more token is bounded by the first token's gradient; it is
    the last token."""
    patch.setattr(SequenceBiasRule, "exact", lambda self, g, *_: norms.row_norms(g[:, 0]))


@mutant(killed_by=killers.added_token, says=REFUSED.format(layer="layer"))
def added_token_with_the_batch_first(patch: pytest.MonkeyPatch) -> None:
    """The layer is assumed to have the batch on the model's batch axis, without a trial: one factor
    would scale a mix of examples. The guard refuses it only in batches that have not as many
    examples as steps."""
    patch.setattr(SequenceBiasRule, "batch_axis", lambda self, default: default)
    patch.setattr(functions, "_passed_by", lambda *args: set())


@mutant(killed_by=killers.transposed_linear, says=MOVED)
def bias_of_a_transposed_linear_layer_uncovered(patch: pytest.MonkeyPatch) -> None:
    """The bias of GPT-2's linear layer is left out of its bound."""
    patch.setattr(TransposedLinearRule, "with_one", lambda self, norms: norms)


@mutant(
    killed_by=killers.transformer_with_the_batch_second,
    says=REFUSED.format(layer=r"layer\.norm1"),
)
@mutant(
    killed_by=killers.attention_with_the_batch_second,
    says=REFUSED.format(layer=r"attention\.qlinear"),
)
def attention_taken_for_layers_of_the_model(patch: pytest.MonkeyPatch) -> None:
    """The layers inside an attention, and inside a transformer, are assumed to have the batch on
    the model's batch axis, without a trial: one factor would scale one time step of all examples.
    The guard refuses it only where the two sizes differ."""
    patch.setattr(coverage, "attention_axes", lambda model: {})
    patch.setattr(functions, "_passed_by", lambda *args: set())
