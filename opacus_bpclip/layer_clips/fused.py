"""Linear layers and convolutions: the output is scaled, not the input, and one product clips.

What it computes is what `SingleClip` computes; the equations are in `FusedRule`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.layer import Layer
from opacus_bpclip.layer_clips.base import Settings
from opacus_bpclip.layer_clips.node import NodeClip
from opacus_bpclip.layer_clips.shared import SharedMeasurement
from opacus_bpclip.norms import rounding_margin
from opacus_bpclip.ops import clip_factors
from opacus_bpclip.provenance import Receipt
from opacus_bpclip.rules import FusedRule
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows

Measurement = tuple[Tensor | None, Tensor, Tensor | None]


class FusedClip(NodeClip):
    """Clips one layer with a `FusedRule`."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        assert isinstance(layer.rule, FusedRule)
        self.rule = layer.rule
        self.keeps = layer.rule.keeps(self.config.bound)
        self.shared: SharedMeasurement[Measurement] = settings.shared
        # What is measured does not depend on what is trained.
        self.geometry = replace(layer.rule, weight=True, bias=True)
        self.scales_output = self.config.max_input_norm is not None

    def node(self, module: nn.Module, x: Tensor, y: Tensor, receipt: Receipt | None) -> Tensor:
        """Scale the output as if the input had been clipped."""
        with torch.no_grad():
            factor, norms, finite = self._measured(x, watched=receipt is not None)
        weight, bias = (getattr(module, name) for name in ("weight", "bias"))
        out: Tensor = _Fused.apply(self, receipt, y, x, bias, weight, factor, norms, finite)
        return out

    def _measured(self, x: Tensor, *, watched: bool) -> Measurement:
        # Only then is it known which forward pass this is.
        if not watched:
            return self.measured(x.detach())
        return self.shared.of(x, self.geometry, self.guard.forward, self.measured)

    def measured(self, x: Tensor) -> Measurement:
        """Return by what to scale the columns, their norms after that, and which rows are finite.

        The factor is ``None`` for 1, the rows for all. Those that are not finite have factor and
        norms 0.
        """
        norms, every = self.rule.measure(x)
        finite = where_needed(every)
        max_norm = self.config.max_input_norm
        if max_norm is None:
            return None, zero_rows(norms, finite), finite
        largest = max_norm * (1 - rounding_margin(x.dtype, x.device))
        factor = zero_rows(self.rule.clip_factor(norms, largest), finite)
        return factor, zero_rows(norms * factor, finite), finite


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
        norms: Tensor,
        finite: Tensor | None,
    ) -> Tensor:
        ctx.clip, ctx.receipt = clip, receipt
        kept = norms if clip.keeps.norms else None
        axis = clip.layer.arguments.batch_axis
        rows = y.movedim(axis, 0)
        if factor is not None:
            rows = clip.rule.rescaled(rows, factor, bias)
        if finite is not None:
            # Zeros where the layer multiplies; nobody may take those for an output.
            x = zero_rows(x, finite)
            rows = torch.where(per_row(finite, rows), rows, float("nan"))
        ctx.save_for_backward(x, weight, factor, kept, finite)
        # Not a view of an input, so that an activation may work in place on it.
        return rows.movedim(0, axis).detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor, norms, finite = ctx.saved_tensors
        clip: FusedClip = ctx.clip
        rule, config = clip.rule, clip.config
        g = g.movedim(clip.layer.arguments.batch_axis, 0)
        divided = examples = g.shape[0] if clip.mean else 1
        if clip.normalize:
            # As in clip_upstream: what is scaled up must not be measured divided by anything.
            g, examples = g * divided, 1
        # The bound's temporary makes room for the product below: fresh memory is slow.
        room = None if torch.compiler.is_compiling() else torch.empty_like(g)
        bound = rule.bound_of_scaled(config.bound, g, x, norms, factor, config.max_input_norm, room)
        by, keep = clip_factors(
            bound,
            finite,
            clip.limit,
            g.dtype,
            size=partial(rule.size, config.bound, g, norms),
            least=rule.least_bound(config.bound, g.dtype, config.max_input_norm),
            examples=examples,
            normalize=clip.normalize,
        )
        g = zero_rows(g, keep)
        joint = by.view(-1, 1, 1)
        if factor is not None:
            joint = joint * factor.to(joint.dtype)
        _, _, _, wants_x, wants_bias, wants_weight, *_ = ctx.needs_input_grad
        dx, dw = rule.gradients(
            torch.mul(g, rule.over_output(joint, g), out=room),
            x,
            weight,
            multiplier=examples,
            wanted=(wants_x, wants_weight),
        )
        if dx is not None and clip.normalize:
            dx = dx / max(divided, 1)
        db = (by @ rule.bias_gradients(g)) * examples if wants_bias else None
        clip.sign(ctx.receipt, dw, db)
        return None, None, None, dx, db, dw, None, None, None
