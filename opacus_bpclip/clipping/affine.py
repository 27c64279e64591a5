"""Normalisation layers: each example's own gradient is small, so it is made, clipped and added up.

An affine map's gradient has one entry for each channel: as many numbers for an example as one of
its positions has. So nothing is estimated. What is measured is the very gradient that is summed,
whatever rounding has made of it, in every mode of ``bound``. Proof:
``docs/rules/normalization.md``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.first_order import first_order
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.clipping.ops import clip_factors
from opacus_bpclip.guard.provenance import Receipt
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import AffineRule
from opacus_bpclip.rules.base import per_row, zero_rows
from opacus_bpclip.rules.cancellation import kept
from opacus_bpclip.rules.norms import row_norms


class AffineClip(NodeClip):
    """Clips one layer with an `AffineRule`."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        assert isinstance(layer.rule, AffineRule)
        self.rule = layer.rule

    def node(self, module: nn.Module, x: Tensor, y: Tensor, receipt: Receipt | None) -> Tensor:
        """Leave the output as it is."""
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        out: Tensor = _Affine.apply(self, receipt, y, x, bias, weight)
        return out


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        clip: AffineClip,
        receipt: Receipt | None,
        y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        ctx.clip, ctx.receipt = clip, receipt
        ctx.save_for_backward(x, weight)
        return y.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        clip: AffineClip = ctx.clip
        g = g.movedim(clip.layer.arguments.batch_axis, 0)
        _, _, _, wants_x, wants_bias, wants_weight = ctx.needs_input_grad
        examples = g.shape[0] if clip.mean else 1
        # First, while the gradient is in the processor's cache.
        size = row_norms(g) * examples
        dx, own = clip.rule.gradients(g, x, weight, wanted=(wants_x, wants_weight, wants_bias))
        own = own * examples  # [B, K]
        measured = row_norms(own)
        # Of many positions' sum rounding alone may be left.
        positions = g[0].numel() // weight.numel() if len(g) else 1
        part = kept(measured, size * math.sqrt(positions), own.dtype, clip.unscaled_limit())
        by, keep = clip_factors(
            measured if clip.normalize else measured * part,
            None,
            clip.limit,
            own.dtype,
            size=lambda: size,
            normalize=clip.normalize,
        )
        total = (by * part.to(by.dtype)) @ zero_rows(own, keep)
        if dx is not None:
            dx = zero_rows(dx.mul_(per_row(by.to(dx.dtype), dx)), keep)
        dw = total[: weight.numel()].view(weight.shape) if wants_weight else None
        db = total[-weight.numel() :].view(weight.shape) if wants_bias else None
        clip.sign(ctx.receipt, dw, db)
        return None, None, None, dx, db, dw
