"""Training sets whose items are transformed anew each time: one row of each, or several views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from opacus_bpclip.model.views import FoldViews
from opacus_bpclip.sampling.views import AugmentedViews


@dataclass(frozen=True)
class Augmentation:
    """How the items of a training set are transformed.

    Args:
        transform: of an input.
        views: of each item; with one, batches look as without augmentation, so that any way to
            clip trains on them.
    """

    transform: Callable[[Any], Tensor]
    views: int

    def of_data(self, train: Any) -> AugmentedViews:
        """Return the transformed training set."""
        made = AugmentedViews if self.views > 1 else _OneView
        return made(train, self.transform, self.views)

    def of_model(self, model: nn.Module) -> nn.Module:
        """Return the model, in training mode if it is to get several views."""
        return FoldViews(model.train(), self.views) if self.views > 1 else model


class _OneView(AugmentedViews):
    """Items as they were, with a transformed input."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, *targets = super().__getitem__(index)
        return x[0], *(target[..., 0] for target in targets)
