"""Normalisation layers: each example's own gradient is small, so it is made, clipped and added up.

An affine map's gradient has one entry for each channel: as many numbers for an example as one of
its positions has. So nothing is estimated. What is measured is the very gradient that is summed,
whatever rounding has made of it, in every mode of ``bound``. Proof:
``docs/rules/normalization.md``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.node import Call, NodeClip
from opacus_bpclip.clipping.use import OwnUse, Use
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import AffineRule, Inputs
from opacus_bpclip.rules.cancellation import cancellation_factor
from opacus_bpclip.rules.norms import row_norms
from opacus_bpclip.rules.precision import wide


class AffineClip(NodeClip):
    """Clips one layer with an `AffineRule`."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        assert isinstance(layer.rule, AffineRule)
        self.rule = layer.rule

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Leave the output as it is."""
        inputs = self.layer.arguments.get(args, kwargs)
        (x,) = inputs
        weight = module._parameters["weight"]
        assert x is not None
        assert weight is not None
        return Call(y.detach(), inputs, (x.detach(), weight.detach()))

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Make the examples' gradients, and the input's."""
        x, weight = (wide(tensor) for tensor in saved)
        g = wide(g)
        assert x is not None
        assert weight is not None
        # First, while the gradient is in the processor's cache.
        size = row_norms(g)
        wanted = (wants[0], self.rule.weight, self.rule.bias)
        dx, own = self.rule.gradients(g, x, weight, wanted=wanted)
        # Of many positions' sum rounding alone may be left.
        positions = g[0].numel() // weight.numel() if g.shape[0] else 1
        examples = self.examples_of(g, graph)
        limit = target.unscaled() / max(examples, 1)
        part = cancellation_factor(row_norms(own), size * math.sqrt(positions), own.dtype, limit)
        names = [name for name, want in zip(("weight", "bias"), wanted[1:], strict=True) if want]
        return OwnUse(self.layer, examples, own, names, size=size, part=part, inputs=(dx,))
