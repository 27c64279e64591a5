"""Linear layers and convolutions: the output is scaled, not the input, and one product clips.

What it computes is what `SingleClip` computes; the equations are in `FusedRule`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.first_order import first_order
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.clipping.ops import clip_factors
from opacus_bpclip.clipping.own import sum_own_gradients
from opacus_bpclip.clipping.shared import SharedMeasurement
from opacus_bpclip.guard.provenance import Receipt
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import FusedRule
from opacus_bpclip.rules.base import per_row, where_finite, zero_rows
from opacus_bpclip.rules.norms import rounding_margin


class Measurement(NamedTuple):
    """What a node needs to know of an input.

    Attributes:
        factor: by what to scale its columns, 0 in rows that are not finite; ``None`` for 1.
        columns: their norms after that, with the bias's entry; ``None`` if the bound needs none.
        finite: ``[B]`` bool, which rows are finite; ``None`` for all.
    """

    factor: Tensor | None
    columns: Tensor | None
    finite: Tensor | None


class FusedClip(NodeClip):
    """Clips one layer with a `FusedRule`."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        assert isinstance(layer.rule, FusedRule)
        self.rule = layer.rule
        self.keeps = layer.rule.keeps(self.config.bound)
        self.shared: SharedMeasurement[Measurement] = settings.shared
        self.scales_output = self.config.max_input_norm is not None

    def node(self, module: nn.Module, x: Tensor, y: Tensor, receipt: Receipt | None) -> Tensor:
        """Scale the output as if the input had been clipped."""
        with torch.no_grad():
            measurement = self._measured(x, watched=receipt is not None)
        weight, bias = (getattr(module, name) for name in ("weight", "bias"))
        out: Tensor = _Fused.apply(self, receipt, y, x, bias, weight, *measurement)
        return out

    def _measured(self, x: Tensor, *, watched: bool) -> Measurement:
        # Only then is it known which forward pass this is.
        if not watched:
            return self.measured(x.detach())
        return self.shared.of(x, self.rule, self.guard.forward, self.measured)

    def measured(self, x: Tensor) -> Measurement:
        """Measure an input, without its graph, as it will have been scaled."""
        norms, total = self.rule.measure(x)
        finite = where_finite(total)
        factor = None
        if self.config.max_input_norm is not None:
            largest = self.config.max_input_norm * (1 - rounding_margin(x.dtype, x.device))
            factor = zero_rows(self.rule.clip_factor(norms, largest), finite)
            norms = norms * factor
        columns = self.rule.with_one(zero_rows(norms, finite)) if self.keeps.norms else None
        return Measurement(factor, columns, finite)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        clip: FusedClip,
        receipt: Receipt | None,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        factor: Tensor | None,
        columns: Tensor | None,
        finite: Tensor | None,
    ) -> Tensor:
        ctx.clip, ctx.receipt = clip, receipt
        axis = clip.layer.arguments.batch_axis
        rows = y.movedim(axis, 0)
        if factor is not None:
            rows = clip.rule.rescaled(rows, factor, bias)
        if finite is not None:
            # Zeros where the layer multiplies; nobody may take those for an output.
            x = zero_rows(x, finite)
            rows = torch.where(per_row(finite, rows), rows, float("nan"))
        ctx.save_for_backward(x, weight, factor, columns, finite)
        # Not a view of an input, so that an activation may work in place on it.
        return rows.movedim(0, axis).detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor, columns, finite = ctx.saved_tensors
        clip: FusedClip = ctx.clip
        rule, config = clip.rule, clip.config
        g = g.movedim(clip.layer.arguments.batch_axis, 0)
        divided = examples = g.shape[0] if clip.mean else 1
        if clip.normalize:
            # As in clip_upstream: what is scaled up must not be measured divided by anything.
            g, examples = g * divided, 1
        factors_of = partial(
            clip_factors,
            limit=clip.limit,
            dtype=g.dtype,
            examples=examples,
            normalize=clip.normalize,
        )
        # Temporaries make room for the product below: fresh memory is slow.
        room = None if torch.compiler.is_compiling() else torch.empty_like(g)
        _, _, _, wants_x, wants_bias, wants_weight, *_ = ctx.needs_input_grad
        dw = None
        if wants_weight and rule.sums_own(config.bound, g):
            assert columns is not None
            scaled = g
            if factor is not None:
                scaled = torch.mul(g, rule.over_output(factor.to(g.dtype), g), out=room)
            (by, keep), part, dw = sum_own_gradients(
                rule,
                g,
                scaled,
                x,
                weight,
                columns,
                finite,
                factors_of,
                clip.unscaled_limit() / max(examples, 1),
            )
            dw = dw * examples
            own_by = by * part.to(by.dtype)
        else:
            by, keep = factors_of(
                rule.bound_of_scaled(
                    config.bound, g, x, columns, factor, config.max_input_norm, room
                ),
                finite,
                size=partial(rule.size_of, config.bound, g, columns),
                least=rule.least_bound(config.bound, g.dtype, config.max_input_norm),
            )
            own_by = by
        g = zero_rows(g, keep)
        # Before the products, which drive the gradient out of the processor's cache.
        db = rule.bias_gradient(g, own_by) * examples if wants_bias else None
        dx = None
        wanted = (wants_x, wants_weight and dw is None)
        if any(wanted):
            joint = by.view(-1, 1, 1)
            if factor is not None:
                joint = joint * factor.to(joint.dtype)
            scaled = torch.mul(g, rule.over_output(joint, g), out=room)
            dx, product = rule.gradients(scaled, x, weight, multiplier=examples, wanted=wanted)
            dw = product if dw is None else dw
        if dx is not None and clip.normalize:
            dx = dx / max(divided, 1)
        clip.sign(ctx.receipt, dw, db)
        return None, None, None, dx, db, dw, None, None, None
