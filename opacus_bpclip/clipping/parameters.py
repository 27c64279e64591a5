"""Parameters that a module broadcasts over the batch: clipped where autograd adds up the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.alignment import Alignment
from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.first_order import first_order
from opacus_bpclip.clipping.ops import clip_factors
from opacus_bpclip.guard.call_checks import replaced_parameter, wrong_batch
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import BroadcastRule
from opacus_bpclip.rules.base import per_row, zero_rows


class ParameterClip(Clip):
    """Hands a module's forward one copy of its parameters for each example.

    All uses of a copy add up in its gradient before it is clipped, so it matters neither how often
    the forward uses the parameter nor how.
    """

    def __init__(self, layer: Layer, rule: BroadcastRule, settings: Settings) -> None:
        self.layer = layer
        self.rule = rule
        self.config, self.guard, self.mean = settings.config, settings.guard, settings.mean
        self.limit = settings.limits[layer.name]
        self.alignments: list[Alignment] = []
        self.parameters = {
            name: parameter
            for name, parameter in layer.module.named_parameters(recurse=False)
            if name in rule.parameters and parameter.requires_grad
        }

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        module = self.layer.module
        return [
            module.register_forward_pre_hook(self.enter, with_kwargs=True),
            module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Put the copies in the parameters' place."""
        if not torch.is_grad_enabled():
            return
        inputs = self.layer.arguments.get(args, kwargs)
        self.guard.require(replaced_parameter(self.layer))
        compiling = torch.compiler.is_compiling()
        followed = False
        if compiling:  # pragma: no cover (torch.compile traces it, unseen by coverage)
            self.guard.note_compiled()
        else:
            followed = self.guard.enter_layer(self.layer)
            if followed:
                self.guard.require(wrong_batch(self.layer, inputs, self.guard.examples))
        (batch_size,) = self.rule.batch_sizes(inputs)
        made = _Copies.apply(self, batch_size, *self.parameters.values())
        copies = dict(zip(self.parameters, made, strict=True))
        if followed:
            self.guard.follow(self.layer, made[0], ())
        module._parameters.update(copies)
        if not compiling:
            name = self.layer.name
            named = {f"{name}.{parameter}": copy for parameter, copy in copies.items()}
            self.alignments.append(Alignment(named, (args, kwargs), self.guard.fail))
            self.alignments[-1].__enter__()

    def leave(self, module: nn.Module, args: Args, output: Any) -> None:
        """Put the parameters back, also after an error."""
        if self.alignments:
            self.alignments.pop().__exit__(None, None, None)
        module._parameters.update(self.parameters)


class _Copies(torch.autograd.Function):
    """Expand parameters over the batch; clip each example's gradient of all, and add up."""

    @staticmethod
    def forward(
        ctx: Any, clip: ParameterClip, batch_size: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.clip = clip
        ctx.shapes = [parameter.shape for parameter in parameters]
        return tuple(
            clip.rule.copies(name, parameter, batch_size)
            for name, parameter in zip(clip.parameters, parameters, strict=True)
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        clip: ParameterClip = ctx.clip
        if clip.mean:
            gradients = tuple(g * len(g) for g in gradients)
        joint = torch.cat([g.flatten(1) for g in gradients], dim=1)
        bound = clip.rule.bound(clip.config.bound, joint, (), None, None)
        normalize = clip.config.upstream == "normalize"
        factor, keep = clip_factors(bound, None, clip.limit, joint.dtype, normalize=normalize)
        sums = [
            zero_rows(g * per_row(factor, g), keep).sum(dim=0).view(shape)
            for g, shape in zip(gradients, ctx.shapes, strict=True)
        ]
        return None, None, *sums
