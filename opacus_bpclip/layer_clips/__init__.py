"""Attach a rule to its layer: one file for each way that a parameter meets the examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.coverage import Layer
from opacus_bpclip.guard import GradientGuard
from opacus_bpclip.layer_clips.base import Clip, Settings
from opacus_bpclip.layer_clips.parameters import ParameterClip
from opacus_bpclip.layer_clips.recurrent import RecurrentClip
from opacus_bpclip.layer_clips.single import SingleClip
from opacus_bpclip.rules import BroadcastRule

__all__ = ["layer_clips"]


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
    settings = Settings(config, limits, guard, mean)
    for layer in layers:
        if layer.recurrence is not None:
            networks.setdefault(id(layer.recurrence), []).append(layer)
        elif isinstance(layer.rule, BroadcastRule):
            yield ParameterClip(layer, layer.rule, settings)
        else:
            yield SingleClip(layer, settings)
    for own in networks.values():
        yield RecurrentClip(own, settings)
