"""Normalisation layers without trainable parameters: their input's gradient, free of cancellation.

Nothing of theirs is clipped. But torch's backward kernels subtract ``mean * sum g`` from
``sum g x``, and the mean of the gradient from the gradient. That leaves rounding errors that change
with the size of a mean loss's batch, and so with every example's companions, and the layers below
would clip a gradient with those in it. See ``docs/rules/normalization.md``.
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

# By the very forward that the rule's closed form belongs to. RMSNorm has no mean.
_RULES: dict[Any, type[LayerNormRule | GroupNormRule]] = {
    nn.LayerNorm.forward: LayerNormRule,
    nn.GroupNorm.forward: GroupNormRule,
    nn.InstanceNorm2d.forward: GroupNormRule,
}
_KERNELS = ("NativeLayerNormBackward0", "NativeGroupNormBackward0")
# Instance norms are batch norms of examples' channels, and a view of those.
_VIEWED_KERNELS = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


class FrozenNormalization(Clip):
    """The hook of one layer, which puts a node in the place of its part of the graph.

    Args:
        module: the layer. Nobody watches it, so its rule is read anew in each forward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def attach(self) -> list[RemovableHandle]:
        """Register the hook; first, so that nothing comes between the layer and it."""
        hook = self.module.register_forward_hook
        return [hook(self.leave, with_kwargs=True, prepend=True)]

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Put the node behind the layer's output."""
        (x,) = (*args, *kwargs.values())
        if not torch.is_grad_enabled() or not x.requires_grad:
            return None
        if "forward" in vars(module) or not _made_by_the_layer(y):
            # Somebody has given it another forward, or changed its output before this hook.
            return None
        if isinstance(module, _InstanceNorm) and (
            module.track_running_stats or x.dim() == module._get_no_batch_dim()
        ):
            # What is no normalisation of one example's channels, or of an example without a batch.
            return None
        rule = _RULES[type(module).forward].from_module(module)
        out: Tensor = _Normalized.apply(rule, y.detach(), x, getattr(module, "weight", None))
        return out


def frozen_normalizations(
    model: nn.Module, clipped: Collection[nn.Module]
) -> Iterator[FrozenNormalization]:
    """Yield what attaches to each normalisation layer that is not clipped.

    Args:
        model: the model.
        clipped: its layers with trainable parameters.
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
        # In one precision: a frozen layer's weight may have another than what flows through it.
        dtype = norm_dtype(x.dtype)
        weight = None if weight is None else weight.to(dtype)
        dx = ctx.rule.input_gradient(g.to(dtype), x.to(dtype), weight)
        return None, None, dx.to(x.dtype), None
