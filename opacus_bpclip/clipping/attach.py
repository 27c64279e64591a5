"""Attach a rule to its layer: one file for each way that a parameter meets the examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from opacus_bpclip.clipping.affine import AffineClip
from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.frozen import frozen_normalizations
from opacus_bpclip.clipping.fused import FusedClip
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.clipping.parameters import ParameterClip
from opacus_bpclip.clipping.recurrent import RecurrentClip
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.single import SingleClip
from opacus_bpclip.clipping.softmax import softmaxes
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.guard.guard import GradientGuard
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import (
    BroadcastRule,
    ConvRule,
    FusedRule,
    GroupNormRule,
    LayerNormRule,
    LinearRule,
    RMSNormRule,
    Rule,
)

__all__ = ["frozen_normalizations", "layer_clips", "softmaxes"]

# By the rule's very class, since one that inherits may describe another layer; and only where the
# layer's forward is the one that the closed form belongs to.
NODES: dict[type[Rule], tuple[type[NodeClip], tuple[type[nn.Module], ...]]] = {
    LinearRule: (FusedClip, (nn.Linear,)),
    ConvRule: (FusedClip, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    LayerNormRule: (AffineClip, (nn.LayerNorm,)),
    RMSNormRule: (AffineClip, (nn.RMSNorm,)),
    GroupNormRule: (
        AffineClip,
        (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
}


def layer_clips(
    layers: Iterable[Layer],
    config: BackpropClipping,
    limits: Mapping[str, Tensor],
    guard: GradientGuard,
    *,
    mean: bool,
) -> Iterator[Clip]:
    """Yield what clips each layer; the layers of one recurrent network are clipped together.

    Args:
        layers: the layers.
        config: how to clip.
        limits: what one use of a layer may contribute, by the layer's name; read when needed.
        guard: watches them.
        mean: whether the loss is a mean over the batch.
    """
    networks: dict[int, list[Layer]] = {}
    settings = Settings(config, limits, guard, mean, SharedMeasurement())
    for layer in layers:
        if layer.recurrence is not None:
            networks.setdefault(id(layer.recurrence), []).append(layer)
        elif isinstance(layer.rule, BroadcastRule):
            yield ParameterClip(layer, layer.rule, settings)
        else:
            yield (_node_clip(layer) or SingleClip)(layer, settings)
    for own in networks.values():
        yield RecurrentClip(own, settings)


def _node_clip(layer: Layer) -> type[NodeClip] | None:
    """Return what clips the layer if its gradient is known in closed form."""
    clip, kinds = NODES.get(type(layer.rule), (None, ()))
    if not any(type(layer.module).forward is kind.forward for kind in kinds):
        return None
    if isinstance(layer.rule, FusedRule) and not layer.rule.is_closed():
        return None
    return clip
