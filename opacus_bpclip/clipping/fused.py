"""Clip linear layers and convolutions by closed forms, whose equations are in ``rules/fused.py``.

Input clipping scales the output, which is equivalent to scaling the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.fused_use import FusedUse, Measurement
from opacus_bpclip.clipping.node import Call, NodeClip
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import FusedRule, Inputs
from opacus_bpclip.rules.base import per_row, where_finite, zero_rows
from opacus_bpclip.rules.precision import rounding_margin, wide
from opacus_bpclip.rules.whitened import PublicMatrix, WhitenedRule


class FusedClip(NodeClip):
    """Clips one layer with a `FusedRule`."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        assert isinstance(layer.rule, FusedRule)
        self.rule = layer.rule
        self.shared: SharedMeasurement[Measurement] = settings.shared
        self.changes_output = self.config.max_input_norm is not None
        self.public = settings.whitening.tensors_of(layer)

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Scale the output as if the input had been clipped."""
        inputs = self.layer.arguments.get(args, kwargs)
        (x,) = inputs
        assert x is not None
        with torch.no_grad():
            factor, columns, finite = self._measured(x)
            bias = module._parameters.get("bias")
            y = y.detach()
            rows = self.layer.arguments.rows(y)
            x = x.detach()
            if factor is not None:
                rows = self.rule.rescaled(rows, factor, bias)
            if finite is not None:
                # `FusedUse` replaces these rows by zeros. The output must not look valid.
                rows = torch.where(per_row(finite, rows), rows, float("nan"))
            y = self.layer.arguments.as_passed(rows)
        weight = module._parameters["weight"]
        assert weight is not None
        return Call(y, inputs, (x, weight.detach(), factor, columns, finite, *self.public))

    def _measured(self, x: Tensor) -> Measurement:
        # Measurements are shared only within a forward pass that the guard has counted.
        if not self.followed:
            return self.measured(x.detach())
        return self.shared.of(x, self.rule, self.guard.forward, self.measured)

    def measured(self, x: Tensor) -> Measurement:
        """Return the norms of an input's columns after input clipping, and their factors."""
        norms, total = self.rule.measure(wide(x))
        finite = where_finite(total)
        factor = None
        if self.config.max_input_norm is not None:
            largest = self.config.max_input_norm * (1 - rounding_margin(x.dtype, x.device))
            factor = zero_rows(self.rule.clip_factor(norms, largest, x), finite)
            norms = norms * factor
        # Norms of examples that are not finite are not finite either; they are not used.
        columns = self.rule.with_one(norms) if self.bound.needs_norms else None
        return Measurement(factor, columns, finite)

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Return the use for the upstream gradient that has arrived."""
        x, weight, factor, columns, finite, *public = saved
        assert x is not None
        assert weight is not None
        rule = self.rule
        if public:
            assert columns is not None
            matrix = PublicMatrix(*(own for own in public if own is not None))
            rule = whitened = WhitenedRule.of(rule, matrix)
            columns = whitened.stretched(columns)
        return FusedUse(
            self.layer,
            rule,
            self.bound,
            self.config.max_input_norm,
            target,
            self.examples_of(g, graph),
            g,
            x,
            weight,
            Measurement(factor, columns, finite),
            wants[0],
        )
