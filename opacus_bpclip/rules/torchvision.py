"""Rules for modules of torchvision that own broadcast parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from opacus_bpclip.rules.broadcast import BroadcastRule
from opacus_bpclip.rules.registry import register_rule


@register_rule("torchvision.models.vision_transformer.VisionTransformer")
class ClassTokenRule(BroadcastRule):
    """``VisionTransformer``: a token, ``[1, 1, D]``, prepended to every example's patches."""

    parameters: ClassVar[tuple[str, ...]] = ("class_token",)


@register_rule("torchvision.models.vision_transformer.Encoder")
class PositionEmbeddingRule(BroadcastRule):
    """``vision_transformer.Encoder``: an embedding, ``[1, T, D]``, added to every example."""

    parameters: ClassVar[tuple[str, ...]] = ("pos_embedding",)


@register_rule("torchvision.models.convnext.CNBlock")
class LayerScaleRule(BroadcastRule):
    """``convnext.CNBlock``: a scale, ``[C, 1, 1]``, multiplied with every example."""

    parameters: ClassVar[tuple[str, ...]] = ("layer_scale",)
    dims: ClassVar[Mapping[str, int]] = {"layer_scale": 4}
