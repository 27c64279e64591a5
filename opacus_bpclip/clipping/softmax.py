"""Softmax layers: what their backward pass leaves of a gradient that cancels does not grow.

A softmax's probabilities sum to one, so it passes nothing on of a gradient that is equal over the
classes. In floating point some rounding is left of that, which changes with the size of a mean
loss's batch. See ``docs/rules/normalization.md``, "What cancels".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip
from opacus_bpclip.rules.cancellation import cancellation_factor
from opacus_bpclip.rules.first_order import first_order

_KERNEL = "SoftmaxBackward0"


class Softmax(Clip):
    """The hook of one layer, which puts a node in the place of its part of the graph.

    Args:
        module: an ``nn.Softmax``.
    """

    def __init__(self, module: nn.Softmax) -> None:
        self.module = module

    def attach(self) -> list[RemovableHandle]:
        """Register the hook; first, so that nothing comes between the layer and it."""
        return [self.module.register_forward_hook(self.leave, prepend=True)]

    def leave(self, module: nn.Softmax, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """Put the node behind the layer's output."""
        x = args[0] if args else None
        if not torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.requires_grad:
            return None
        own = torch.compiler.is_compiling() or type(y.grad_fn).__name__ == _KERNEL
        if "forward" in vars(module) or module.dim is None or not own or x.dtype != y.dtype:
            return None
        out: Tensor = _Probabilities.apply(module.dim, y.detach(), x)
        return out


def softmaxes(model: nn.Module) -> Iterator[Softmax]:
    """Yield what attaches to each softmax layer of a model."""
    for module in model.modules():
        if type(module).forward is nn.Softmax.forward:
            yield Softmax(module)  # type: ignore[arg-type]


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dim: int, y: Tensor, x: Tensor) -> Tensor:
        ctx.dim = dim
        out = y.detach()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[None, None, Tensor]:
        (y,) = ctx.saved_tensors
        # Less the likeliest class's gradient, which changes nothing in real numbers: what is equal
        # cancels exactly, and where one class has nearly all, nothing else cancels.
        likeliest = y.argmax(dim=ctx.dim, keepdim=True)
        common = g.gather(ctx.dim, likeliest)
        weighted = y * (g - common)
        left = weighted - y * weighted.sum(dim=ctx.dim, keepdim=True)
        cancelled = (y * (g.abs() + common.abs())).scatter(ctx.dim, likeliest, 0.0)
        norms = [
            torch.linalg.vector_norm(part, dim=ctx.dim, keepdim=True) for part in (left, cancelled)
        ]
        return None, None, left * cancellation_factor(norms[0], norms[1], g.dtype)
