"""Clip normalisation layers by their per-example gradients, which are small.

The gradient of an affine map has one entry per channel: per example as many numbers as one
position has. So no bound is needed: for every value of ``bound``, the gradient that is measured is
the one that is summed, rounding errors included. Proof: ``docs/rules/normalization.md``.
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
        """Keep the layer's output unchanged."""
        inputs = self.layer.arguments.get(args, kwargs)
        (x,) = inputs
        weight = module._parameters["weight"]
        assert x is not None
        assert weight is not None
        return Call(y.detach(), inputs, (x.detach(), weight.detach()))

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Compute the per-example gradients of the parameters, and the gradient of the input."""
        x, weight = (wide(tensor) for tensor in saved)
        g = wide(g)
        assert x is not None
        assert weight is not None
        # Before anything else, while the upstream gradient is in the cache.
        size = row_norms(g)
        wanted = (wants[0], self.rule.weight, self.rule.bias)
        dx, own = self.rule.gradients(g, x, weight, wanted=wanted)
        # Where the positions cancel, their sum may be nothing but rounding error.
        positions = g[0].numel() // weight.numel() if g.shape[0] else 1
        examples = self.examples_of(g, graph)
        limit = target.unscaled() / max(examples, 1)
        cancelled = size * math.sqrt(positions)
        cancellation = cancellation_factor(row_norms(own), cancelled, own.dtype, limit)
        names = [name for name, want in zip(("weight", "bias"), wanted[1:], strict=True) if want]
        return OwnUse(
            self.layer, examples, own, names, size=size, cancellation=cancellation, inputs=(dx,)
        )
