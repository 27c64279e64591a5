"""Attach a rule to its layer: one file for each way that a parameter meets the examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from opacus.layers.dp_rnn import RNNLinear
from torch import nn

from opacus_bpclip.clipping.affine import AffineClip
from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.frozen import frozen_normalizations
from opacus_bpclip.clipping.fused import FusedClip
from opacus_bpclip.clipping.layers import LayerClip
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.clipping.parameters import ParameterClip
from opacus_bpclip.clipping.recurrent import RecurrentClip
from opacus_bpclip.clipping.softmax import softmaxes
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import (
    BroadcastRule,
    ConvRule,
    FunctionRule,
    FusedRule,
    GroupNormRule,
    LayerNormRule,
    LinearRule,
    RMSNormRule,
    Rule,
    TransposedLinearRule,
)

__all__ = ["frozen_normalizations", "layer_clips", "softmaxes"]

# By the rule's very class, since one that inherits may describe another layer; and only where the
# layer's forward is the one that the closed form belongs to.
CLOSED_FORMS: dict[type[Rule], tuple[type[NodeClip], tuple[type[nn.Module] | str, ...]]] = {
    LinearRule: (FusedClip, (nn.Linear, RNNLinear)),
    TransposedLinearRule: (FusedClip, ("transformers.pytorch_utils.Conv1D",)),
    ConvRule: (FusedClip, (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
    LayerNormRule: (AffineClip, (nn.LayerNorm,)),
    RMSNormRule: (AffineClip, (nn.RMSNorm,)),
    GroupNormRule: (
        AffineClip,
        (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    ),
}


def layer_clips(layers: Iterable[Layer], settings: Settings) -> Iterator[Clip]:
    """Yield what clips each layer; the layers of one recurrent network are clipped together.

    Args:
        layers: the layers.
        settings: how to clip them.
    """
    networks: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.recurrence is not None:
            networks.setdefault(id(layer.recurrence), []).append(layer)
        elif isinstance(layer.rule, FunctionRule):
            continue  # No call of the module: `functions` follows what it calls.
        elif isinstance(layer.rule, BroadcastRule):
            yield ParameterClip(layer, layer.rule, settings)
        else:
            yield (_closed_form(layer) or LayerClip)(layer, settings)
    for own in networks.values():
        yield RecurrentClip(own, settings)


def _closed_form(layer: Layer) -> type[NodeClip] | None:
    """Return what clips the layer if its gradient is known in closed form."""
    clip, kinds = CLOSED_FORMS.get(type(layer.rule), (None, ()))
    if not any(_runs_as(type(layer.module), kind) for kind in kinds):
        return None
    if isinstance(layer.rule, FusedRule) and not layer.rule.is_closed():
        return None
    return clip


def _runs_as(kind: type[nn.Module], known: type[nn.Module] | str) -> bool:
    """Return whether a class has a known class's forward."""
    if isinstance(known, str):
        return f"{kind.__module__}.{kind.__qualname__}" == known
    return kind.forward is known.forward
