"""What the ways of clipping a layer have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.budget import Budget
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.model.functions import Followed


class Settings(NamedTuple):
    """How to clip, and who watches.

    Attributes:
        config: the public options.
        targets: what one use of a layer is scaled to, by the layer's name; with a joint budget,
            what all layers together are.
        groups: by the layer's name, the name of the layers that it shares parameters with.
        guard: watches the layers.
        mean: whether the loss is a mean over the batch.
        shared: what the layers measure of inputs that they have in common.
        budget: opens scopes.
        followed: which functions are followed in the forward pass at hand.
    """

    config: BackpropClipping
    targets: Mapping[str, Target]
    groups: Mapping[str, str]
    guard: GradientGuard
    mean: bool
    shared: SharedMeasurement[Any]
    budget: Budget
    followed: Followed


class Clip(ABC):
    """Keeps an example's contribution to some parameters within their limit."""

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
