"""Choose how each layer is clipped: by a closed form, by its own autograd, or otherwise."""

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
from opacus_bpclip.rules.views import ConvOverViews, GroupNormOverViews

__all__ = ["frozen_normalizations", "layer_clips", "softmaxes"]

# Looked up by the exact class of the rule: a subclass may describe another layer. The closed form
# also needs the layer to have the forward of one of these classes.
CLOSED_FORMS: dict[type[Rule], tuple[type[NodeClip], tuple[type[nn.Module] | str, ...]]] = {
    LinearRule: (FusedClip, (nn.Linear, RNNLinear)),
    TransposedLinearRule: (FusedClip, ("transformers.pytorch_utils.Conv1D",)),
    **dict.fromkeys((ConvRule, ConvOverViews), (FusedClip, (nn.Conv1d, nn.Conv2d, nn.Conv3d))),
    LayerNormRule: (AffineClip, (nn.LayerNorm,)),
    RMSNormRule: (AffineClip, (nn.RMSNorm,)),
    **dict.fromkeys(
        (GroupNormRule, GroupNormOverViews),
        (AffineClip, (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
    ),
}


def layer_clips(layers: Iterable[Layer], settings: Settings) -> Iterator[Clip]:
    """Yield the `Clip` of each layer, and one for all layers of a recurrent network.

    Args:
        layers: the trainable layers.
        settings: the settings of the clipping.
    """
    networks: dict[int, list[Layer]] = {}
    for layer in layers:
        if layer.recurrence is not None:
            networks.setdefault(id(layer.recurrence), []).append(layer)
        elif isinstance(layer.rule, FunctionRule):
            continue  # `clipping.functions` handles the functions that this module calls.
        elif isinstance(layer.rule, BroadcastRule):
            yield ParameterClip(layer, layer.rule, settings)
        else:
            yield (_closed_form(layer) or LayerClip)(layer, settings)
    for own in networks.values():
        yield RecurrentClip(own, settings)


def _closed_form(layer: Layer) -> type[NodeClip] | None:
    """Return the `Clip` class of a layer whose gradient has a closed form, otherwise ``None``."""
    clip, kinds = CLOSED_FORMS.get(type(layer.rule), (None, ()))
    if not any(_same_forward(type(layer.module), kind) for kind in kinds):
        return None
    if isinstance(layer.rule, FusedRule) and not layer.rule.is_closed():
        return None
    return clip


def _same_forward(kind: type[nn.Module], known: type[nn.Module] | str) -> bool:
    """Return whether a class has the forward of a known class."""
    if isinstance(known, str):
        return f"{kind.__module__}.{kind.__qualname__}" == known
    return kind.forward is known.forward
