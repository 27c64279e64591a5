"""What the ways of clipping a layer have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.guard import GradientGuard


class Settings(NamedTuple):
    """How to clip, and who watches.

    Attributes:
        config: the public options.
        limits: what one use of a layer may contribute, by the layer's name; read when needed.
        guard: watches the layers.
        mean: whether the loss is a mean over the batch.
        shared: what the layers measure of inputs that they have in common.
    """

    config: BackpropClipping
    limits: Mapping[str, Tensor]
    guard: GradientGuard
    mean: bool
    shared: SharedMeasurement[Any]


class Clip(ABC):
    """Keeps an example's contribution to some parameters within their limit."""

    @abstractmethod
    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
