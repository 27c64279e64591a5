"""The interface of all ways to clip a layer, and the settings that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.budget import Budget
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.whitening import Whitening
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.model.functions import Followed


class Settings(NamedTuple):
    """The settings of the clipping, one object for a model.

    Attributes:
        config: the public options.
        targets: by the layer's name, the clipping limit of one use of the layer; with a joint
            budget, that of the whole model.
        groups: by the layer's name, the name of its group: layers that share parameters.
        guard: checks every call and every gradient.
        mean: whether the loss is a mean over the batch.
        shared: measurements of inputs that several layers have in common.
        budget: opens the scopes in which uses share their factors.
        followed: the functions on parameters that are followed in this forward pass.
        whitening: the matrices that whiten layer inputs.
    """

    config: BackpropClipping
    targets: Mapping[str, Target]
    groups: Mapping[str, str]
    guard: GradientGuard
    mean: bool
    shared: SharedMeasurement[Any]
    budget: Budget
    followed: Followed
    whitening: Whitening


class Clip(ABC):
    """Clips each example's contribution to the gradients of some parameters."""

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
