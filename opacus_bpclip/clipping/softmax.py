"""Softmax layers: suppress the rounding errors of gradients that cancel in their backward pass.

The probabilities sum to one, so a gradient that is equal over all classes cancels. In floating
point, rounding errors remain, which depend on the batch's private size if the loss is a mean. See
``docs/rules/normalization.md``, "What cancels".
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
    """The hook of one layer, which replaces the layer's autograd graph by one node.

    Args:
        module: an ``nn.Softmax``.
    """

    def __init__(self, module: nn.Softmax) -> None:
        self.module = module

    def attach(self) -> list[RemovableHandle]:
        """Register the hook before all others, so that it sees the layer's own output."""
        return [self.module.register_forward_hook(self.leave, prepend=True)]

    def leave(self, module: nn.Softmax, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """Replace the layer's graph by the node."""
        x = args[0] if args else None
        if not torch.is_grad_enabled() or not isinstance(x, Tensor) or not x.requires_grad:
            return None
        own = torch.compiler.is_compiling() or type(y.grad_fn).__name__ == _KERNEL
        if "forward" in vars(module) or module.dim is None or not own or x.dtype != y.dtype:
            return None
        out: Tensor = _Probabilities.apply(module.dim, y.detach(), x)
        return out


def softmaxes(model: nn.Module) -> Iterator[Softmax]:
    """Yield a `Softmax` for each softmax layer of a model."""
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
        # Subtract the gradient of the likeliest class. In real numbers this changes nothing. In
        # floating point, equal gradients then cancel exactly, and where one class has nearly all
        # the probability, nothing else cancels.
        likeliest = y.argmax(dim=ctx.dim, keepdim=True)
        common = g.gather(ctx.dim, likeliest)
        weighted = y * (g - common)
        dx = weighted - y * weighted.sum(dim=ctx.dim, keepdim=True)
        cancelled = (y * (g.abs() + common.abs())).scatter(ctx.dim, likeliest, 0.0)
        norms = [
            torch.linalg.vector_norm(part, dim=ctx.dim, keepdim=True) for part in (dx, cancelled)
        ]
        return None, None, dx * cancellation_factor(norms[0], norms[1], g.dtype)
