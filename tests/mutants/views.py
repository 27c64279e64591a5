"""Several views of one example that are measured apart, mixed up, or not averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.losses import criterion
from opacus_bpclip.model.calls import CallArguments
from opacus_bpclip.model.places import Place
from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.probe import order
from opacus_bpclip.rules.views import ConvOverViews, GroupNormOverViews
from opacus_bpclip.sampling import views
from tests.mutants import views_killers as killers
from tests.mutants.registry import MOVED, mutant


@mutant(killed_by=killers.equal_views_through_two_layers, says="joint" + MOVED)
def views_taken_for_examples(patch: pytest.MonkeyPatch) -> None:
    """Each view is measured and clipped as if it were an example: an example contributes as often
    as it has views."""
    batch_size = BackpropClipHooks._batch_size

    def rows(self: BackpropClipHooks, args: Any, kwargs: Any) -> int:
        return batch_size(self, args, kwargs) * args[0].shape[1]

    patch.setattr(BackpropClipHooks, "_batch_size", rows)
    patch.setattr(FoldViews, "rows", 1)


@mutant(killed_by=killers.large_second_view_of_a_convolution, says=MOVED)
def first_view_measured(patch: pytest.MonkeyPatch) -> None:
    """A convolution's bound counts the positions of the first view: what the others add is not
    bounded."""
    upstream = ConvOverViews.upstream

    def first(self: ConvOverViews, g: Tensor) -> Tensor:
        kept = torch.zeros_like(g)
        kept[:, 0] = g[:, 0]
        return upstream(self, kept)

    patch.setattr(ConvOverViews, "upstream", first)


@mutant(killed_by=killers.small_first_view_by_product, says=MOVED)
def views_clipped_as_the_first(patch: pytest.MonkeyPatch) -> None:
    """The first view's factor clips the inputs of all views: another view's patches stay above the
    norm that the product bound assumes."""
    clip_factor = ConvOverViews.clip_factor

    def first(self: ConvOverViews, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        factor = clip_factor(self, norms, max_norm, x)
        return factor[:, :, :1].expand_as(factor)

    patch.setattr(ConvOverViews, "clip_factor", first)


@mutant(killed_by=killers.views_of_a_group_norm, says="differs from the mean")
def views_normalised_together(patch: pytest.MonkeyPatch) -> None:
    """The gradient of a group norm is made as if it normalised over all views of an example, which
    the layer does not do."""
    gradients = GroupNormOverViews.gradients

    def joined(self: GroupNormOverViews, g: Tensor, x: Tensor, *args: Any, **wanted: Any) -> Any:
        g, moved = (t.transpose(1, 2).unsqueeze(1) for t in (g, x))
        dx, own = gradients(self, g, moved, *args, **wanted)
        return None if dx is None else dx.squeeze(1).transpose(1, 2), own

    patch.setattr(GroupNormOverViews, "gradients", joined)


@mutant(killed_by=killers.views_behind_a_criterion, says="differs from the mean")
def views_added_up(patch: pytest.MonkeyPatch) -> None:
    """The criterion adds the losses of the views up: the gradient that is clipped is as many times
    as large as the mean of the views' gradients."""

    def added(losses: Tensor, _: Tensor | None) -> Tensor:
        return losses.flatten(1).sum(dim=1)

    patch.setattr(criterion, "mean_of_counted", added)


@mutant(killed_by=killers.evaluation_mode_in_the_backward_pass, says="claimed")
def views_counted_in_the_backward_pass(patch: pytest.MonkeyPatch) -> None:
    """How many rows an example has is asked when the gradient arrives, and not in the forward pass.
    In evaluation mode by then, each view is clipped as an example."""
    rows = CallArguments.rows

    def now(self: CallArguments, x: Tensor, _: int | None = None) -> Tensor:
        return rows(self, x)

    patch.setattr(CallArguments, "rows", now)


@mutant(killed_by=killers.interleaved_views, says="views of several examples")
def order_of_views_not_checked(patch: pytest.MonkeyPatch) -> None:
    """Layers with several rows of each example are left out of the search for rows in another
    order: the rows that are measured together are of several examples."""
    rows_of_layers = order.rows_of_layers

    def without_views(*args: Any) -> Any:
        return {k: v for k, v in rows_of_layers(*args).items() if v == (Place(0),)}

    patch.setattr("opacus_bpclip.probe.coupling.rows_of_layers", without_views)


@mutant(killed_by=killers.items_that_draw_random_numbers, says="depend on what was read before")
def random_numbers_shared(patch: pytest.MonkeyPatch) -> None:
    """The views of an item are made with the random numbers that earlier items have left."""

    def shared(*_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    patch.setattr(views, "repeatable", shared)
