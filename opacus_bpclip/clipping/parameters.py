"""Clip parameters that a module broadcasts over the batch, by one copy for each example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.alignment import Alignment
from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.budget import BUDGETS, Counters
from opacus_bpclip.clipping.node import enter
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import OwnUse
from opacus_bpclip.guard.call_checks import (
    changed_layer,
    number,
    ran_twice,
    replaced_parameter,
    wrong_batch,
    wrong_rows,
)
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import BroadcastRule
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import wide


class ParameterClip(Clip):
    """Gives a module's forward one copy of its parameters for each example.

    Autograd adds up all uses of a copy before its gradient is clipped. So the forward may use the
    parameter in any way and as often as it likes.
    """

    def __init__(self, layer: Layer, rule: BroadcastRule, settings: Settings) -> None:
        self.layer = layer
        self.rule = rule
        self.guard, self.mean = settings.guard, settings.mean
        self.target = settings.targets[layer.name]
        self.group = settings.groups[layer.name]
        self.budget = settings.budget
        self.index = len(self.budget.clips)
        self.budget.clips.append(self)
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
            # Before all other hooks: FSDP's own takes the parameters away.
            module.register_forward_hook(self.leave, always_call=True, prepend=True),
        ]

    def enter(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Replace the parameters by the copies."""
        if not torch.is_grad_enabled():
            return
        inputs = self.layer.arguments.get(args, kwargs)
        self.guard.require(replaced_parameter(self.layer))
        (batch_size,) = self.rule.batch_sizes(inputs)
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            self.guard.ran_compiled = True
            sinks = self.budget.sinks_of(self.layer)
            made = _traced_copies(
                self.budget.key,
                self.index,
                batch_size,
                self.target.norms,
                self.budget.present,
                self.budget.counters_of(self.layer),
                self.budget.traced_token(),
                len(sinks),
                *sinks,
                *self.parameters.values(),
            )
            module._parameters.update(zip(self.parameters, made, strict=True))
            return
        scope = None
        if self.guard.enter_layer(self.layer):
            self.guard.require(wrong_batch(self.layer, inputs, self.guard.examples))
            scope = self.budget.scope_of(self.target, at_once=True)
        made = self.copies(scope, batch_size, tuple(self.parameters.values()))
        copies = dict(zip(self.parameters, made, strict=True))
        module._parameters.update(copies)  # type: ignore[arg-type]
        name = self.layer.name
        named = {f"{name}.{parameter}": copy for parameter, copy in copies.items()}
        self.alignments.append(Alignment(named, (args, kwargs), self.guard.fail))
        self.alignments[-1].__enter__()

    def copies(
        self, scope: Scope | None, batch_size: int, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Return the copies of the parameters, ``[B, ...]`` each, attached to a node.

        Args:
            scope: the scope of the call; ``None`` in activation checkpointing's second run.
            batch_size: the number of examples ``B``.
            parameters: the layer's broadcast parameters.
        """
        token = enter(scope, self.layer, self.group)
        detached = (parameter.detach() for parameter in parameters)
        copies: tuple[Tensor, ...] = _Copies.apply(self, scope, batch_size, token, *detached)
        return copies

    def leave(self, module: nn.Module, args: Args, output: Any) -> None:
        """Put the parameters back, also after an error."""
        if self.alignments:
            self.alignments.pop().__exit__(None, None, None)
        module._parameters.update(self.parameters)


class _Copies(torch.autograd.Function):
    """Expand parameters over the batch; receive the per-example gradients of all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        clip: ParameterClip,
        scope: Scope | None,
        batch_size: int,
        _: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.clip, ctx.scope, ctx.spent = clip, scope, False
        ctx.count = len(parameters)
        return tuple(
            clip.rule.copies(name, parameter, batch_size)
            for name, parameter in zip(clip.parameters, parameters, strict=True)
        )

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        clip: ParameterClip = ctx.clip
        if ctx.spent:
            clip.guard.fail(ran_twice(clip.layer))
        ctx.spent = True
        own = torch.cat([wide(g.flatten(1)) for g in gradients], dim=1)
        examples = own.shape[0] if clip.mean else 1
        ctx.scope.arrive(OwnUse(clip.layer, examples, own, list(clip.parameters)))
        return (None,) * (4 + ctx.count)


@torch._dynamo.allow_in_graph
def _traced_copies(
    key: str,
    index: int,
    batch_size: int,
    norms: Tensor,
    present: Tensor | None,
    counters: Counters,
    token: Tensor | None,
    count: int,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Make the copies while the graph is traced.

    Args:
        key: the budget's key.
        index: the index of the layer's clip in the budget.
        batch_size: the number of examples.
        norms: the norms of the target.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
        ends: the tensors of `Ends` that count the layer's scopes.
        token: the token of the forward pass, with a joint budget.
        count: the number of the layer's trainable parameters.
        tensors: the sinks of the parameters' sums, and the broadcast parameters.
    """
    budget = BUDGETS[key]
    clip: ParameterClip = budget.clips[index]
    clip.guard.require(changed_layer(clip.layer))
    rows = clip.guard.examples if budget.rows is None else budget.rows
    if rows:
        shape, axis = (number(batch_size),), clip.layer.arguments.batch_axis
        clip.guard.require(wrong_rows(clip.layer.name, shape, shape[0], rows, axis))
    target = clip.target._replace(norms=norms)
    scope = budget.traced_scope(clip.layer, target, present, counters, token, tensors[:count])
    copies = clip.copies(scope, batch_size, tensors[count:])
    scope.close()
    return copies
