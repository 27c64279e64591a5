"""Input clipping: a layer's inputs, measured and scaled by its rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.rules.base import Inputs, Prepared, Rule
from opacus_bpclip.rules.precision import rounding_margin


def prepare_inputs(inputs: Inputs, rule: Rule, max_norm: float | None) -> Prepared:
    """Measure a layer's inputs and clip them to ``max_norm``, without recording a graph.

    Guarantee: every column of the result that enters the layer's product has norm at most
    ``max_norm``, rounding included.

    Args:
        inputs: the layer's inputs, batch first.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column; ``None`` measures without clipping.
    """
    floating = next((x for x in inputs if x is not None and x.is_floating_point()), None)
    if max_norm is not None and floating is not None:
        max_norm *= 1 - rounding_margin(floating.dtype, floating.device)
    with torch.no_grad():
        return rule.prepare(tuple(x if x is None else x.detach() for x in inputs), max_norm)


def scale_input(inputs: Inputs, rule: Rule, max_norm: float) -> Inputs:
    """Clip every column of a layer's inputs to ``max_norm``.

    The backward pass treats the factor as a constant: it multiplies the gradient by the factor, and
    does not differentiate the factor itself.

    Args:
        inputs: the layer's inputs, batch first; rows that are not finite become nan.
        rule: the layer's rule.
        max_norm: largest L2 norm of a column.
    """
    prepared = prepare_inputs(inputs, rule, max_norm)
    scales = prepared.scales or (None,) * len(inputs)
    return tuple(
        value
        if x is None or value is None or not x.requires_grad
        else _Scaled.apply(x, value, scale)
        for x, value, scale in zip(inputs, prepared.inputs, scales, strict=True)
    )


class _Scaled(torch.autograd.Function):
    """Replace an input by its scaled form; the gradient is multiplied by the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        return value.clone() if torch.compiler.is_compiling() else value.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return (g if scale is None else g * scale), None, None
