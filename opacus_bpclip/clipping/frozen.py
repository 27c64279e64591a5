"""Normalisation layers without trainable parameters: compute the input's gradient accurately.

These layers have nothing to clip. But PyTorch's backward kernels subtract ``mean * sum g`` from
``sum g x``, and the mean of the gradient from the gradient. That leaves rounding errors which, with
a mean loss, depend on the batch's private size, and which reach the layers below. The node here
avoids them. See ``docs/rules/normalization.md``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.rules import AffineRule, GroupNormRule, LayerNormRule
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import norm_dtype

# By the layer's forward method. RMSNorm is left out: it subtracts no mean.
_RULES: dict[Any, type[LayerNormRule | GroupNormRule]] = {
    nn.LayerNorm.forward: LayerNormRule,
    nn.GroupNorm.forward: GroupNormRule,
    nn.InstanceNorm2d.forward: GroupNormRule,
}
_KERNELS = ("NativeLayerNormBackward0", "NativeGroupNormBackward0")
# An instance norm runs a batch norm on a view of the batch.
_VIEWED_KERNELS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


class FrozenNormalization(Clip):
    """The hook of one layer, which replaces the layer's autograd graph by one node.

    Args:
        module: the layer. The guard does not check it for changes, so its rule is made anew in each
            forward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def attach(self) -> list[RemovableHandle]:
        """Register the hook before all others, so that it sees the layer's own output."""
        hook = self.module.register_forward_hook
        return [hook(self.leave, with_kwargs=True, prepend=True)]

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Replace the layer's graph by the node."""
        (x,) = (*args, *kwargs.values())
        if not torch.is_grad_enabled() or not x.requires_grad:
            return None
        if "forward" in vars(module) or not _made_by_the_layer(y):
            # The layer has another forward, or a hook has changed its output.
            return None
        if isinstance(module, _InstanceNorm) and (
            module.track_running_stats or x.dim() == module._get_no_batch_dim()
        ):
            # It normalises by running statistics, or its input has no batch axis.
            return None
        rule = _RULES[type(module).forward].from_module(module)
        out: Tensor = _Normalized.apply(rule, y.detach(), x, getattr(module, "weight", None))
        return out


def frozen_normalizations(
    model: nn.Module, clipped: Collection[nn.Module]
) -> Iterator[FrozenNormalization]:
    """Yield a `FrozenNormalization` for each normalisation layer that is not clipped.

    Args:
        model: the model.
        clipped: the layers with trainable parameters, which are clipped.
    """
    for module in model.modules():
        if type(module).forward in _RULES and module not in clipped:
            yield FrozenNormalization(module)


def _made_by_the_layer(y: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    node = y.grad_fn
    if type(node).__name__ == "ViewBackward0":
        assert node is not None
        return type(node.next_functions[0][0]).__name__ in _VIEWED_KERNELS
    return type(node).__name__ in _KERNELS


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: AffineRule, y: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.rule = rule
        ctx.save_for_backward(x, weight)
        return y.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # A frozen layer's weight may have another dtype than its input.
        dtype = norm_dtype(x.dtype)
        weight = None if weight is None else weight.to(dtype)
        dx = ctx.rule.input_gradient(g.to(dtype), x.to(dtype), weight)
        return None, None, dx.to(x.dtype), None
