"""Replace a layer's autograd graph by one node, which computes the gradients itself.

The layer runs unchanged, but its output is detached and attached to the node. So autograd sends no
gradient to the layer's parameters. (In a traced graph it sends them the sums, through the scope's
token.)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Clip, Settings
from opacus_bpclip.clipping.budget import BUDGETS, Counters
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.scope import Scope, unwatched_token
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.guard.call_checks import (
    changed_layer,
    earlier_hook,
    ran_twice,
    replaced_parameter,
    wrong_batch,
)
from opacus_bpclip.model.calls import Args, Kwargs, parameters_replaced
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.saved_norms import SavedNorm
from opacus_bpclip.rules import Inputs
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import full_precision


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        out: the output to return in the place of the layer's.
        inputs: the layer's inputs, whose gradients the node computes.
        saved: tensors for the backward pass.
        graph: other objects for the backward pass, such as the layer's own graph.
    """

    out: Tensor
    inputs: Inputs
    saved: Inputs
    graph: Any = None


class NodeClip(Clip):
    """The hooks of one layer.

    Args:
        layer: the layer.
        settings: the settings of the clipping.

    Attributes:
        changes_output: whether clipping changes the layer's output; then also in evaluation.
        followed: whether a backward pass will go through the current call.
        passed_by: whether the current call is clipped by the functions that it calls, not by the
            layer's rule.
        public: tensors that the rule needs and the call does not; a traced graph has its own.
    """

    def __init__(self, layer: Layer, settings: Settings) -> None:
        self.layer = layer
        self.config, self.guard, self.mean = settings.config, settings.guard, settings.mean
        self.target = settings.targets[layer.name]
        self.group = settings.groups[layer.name]
        self.budget, self.bound = settings.budget, settings.budget.bound
        self.functions = settings.followed
        self.passed_by = False
        self.index = len(self.budget.clips)
        self.budget.clips.append(self)
        self.changes_output = False
        self.followed = False
        self.public: tuple[Tensor, ...] = ()
        self._key = 0

    @abstractmethod
    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Return what the node needs of a call that the layer has just made.

        Args:
            module: the layer.
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
            y: the layer's output.
        """

    @abstractmethod
    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Return the use for the upstream gradient that has arrived.

        Args:
            g: the gradient, batch first.
            graph: `Call.graph`.
            saved: `Call.saved`.
            target: the norm that gradients are scaled to.
            wants: which inputs need a gradient.
        """

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks; `leave` before all others, so that it sees the layer's own output."""
        module = self.layer.module
        before = module.register_forward_pre_hook(self.enter)
        after = module.register_forward_hook(self.leave, with_kwargs=True, prepend=True)
        self._key = after.id
        if not self.changes_output:
            return [before, after]
        assert self.config.max_input_norm is not None
        return [before, after, *SavedNorm(self.config.max_input_norm).attach(module)]

    def enter(self, _: nn.Module, args: Args) -> None:
        """Let the guard check and count the call before the layer runs."""
        self.followed = self.passed_by = False
        if not torch.is_grad_enabled():
            return
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            self.guard.ran_compiled = True
            return
        self.passed_by = self.functions.passes_by(self.layer.name)
        if not self.passed_by:
            self.followed = self.guard.enter_layer(self.layer)
            self.functions.pause()

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Replace the layer's graph by the node."""
        followed = self.followed
        if self.passed_by:
            return None
        if not torch.is_grad_enabled():
            return self._call(module, args, kwargs, y).out if self.changes_output else None
        if torch.compiler.is_compiling():  # pragma: no cover (traced, unseen by coverage)
            return self.leave_traced(args, kwargs, y)
        self.functions.resume()
        if followed:
            self.check(args, kwargs, y)
        call = self._call(module, args, kwargs, y)
        self.followed = False
        return self.attached(call, self.scope() if followed else None)

    def _call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        with full_precision():
            return self.call(module, args, kwargs, y)

    def leave_traced(self, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor:
        """Do what `leave` does, in a graph that is being traced."""
        passed = self.layer.arguments.passed(args, kwargs)
        sinks = self.budget.sinks_of(self.layer)
        own = self.layer.module._parameters.values()
        return _traced(
            self.budget.key,
            self.index,
            y,
            self.target.norms,
            self.budget.present,
            self.budget.counters_of(self.layer),
            self.budget.traced_token(),
            self.public,
            len(sinks),
            *sinks,
            *own,
            *passed,
        )

    def check(self, args: Args, kwargs: Kwargs, y: Tensor) -> None:
        """Check a call that a backward pass will go through."""
        inputs = self.layer.arguments.get(args, kwargs)
        self.guard.require(earlier_hook(self.layer, self._key))
        self.guard.require(wrong_batch(self.layer, inputs, self.guard.examples))
        self.guard.check_output(self.layer, y)

    def scope(self) -> Scope:
        """Return the scope of the current call."""
        return self.budget.scope_of(self.target, at_once=True)

    def attached(self, call: Call, scope: Scope | None) -> Tensor:
        """Return the layer's output, attached to the node.

        Args:
            call: the call of the layer.
            scope: the scope of the call; ``None`` in activation checkpointing's second run, which
                only recomputes the saved tensors.
        """
        token = enter(scope, self.layer, self.group)
        out: Tensor = _Node.apply(self, scope, call, token, *call.inputs)
        return out

    def examples_of(self, g: Tensor, graph: Any) -> int:
        """Return the number that the loss has divided an upstream gradient by, batch first."""
        return g.shape[0] if self.mean else 1


def enter(scope: Scope | None, layer: Layer, group: str) -> Tensor:
    """Register a call of a layer in its scope, if there is one; return the token for its node."""
    if scope is None:
        return unwatched_token()
    scope.enter(layer, group)
    token = scope.token
    assert token is not None
    if scope.at_once:
        scope.close()
    return token


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, clip: NodeClip, scope: Scope | None, call: Call, _: Tensor, *inputs: Tensor | None
    ) -> Tensor:
        ctx.clip, ctx.scope, ctx.spent = clip, scope, False
        ctx.save_for_backward(*call.saved)
        ctx.graph = call.graph
        # Now: the model may be in evaluation mode in the backward pass.
        ctx.count = clip.layer.arguments.count(call.out)
        # Detached, so that it is not a view of an input: activations may then work in place on it.
        return call.out.detach()

    @staticmethod
    @first_order
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        clip: NodeClip = ctx.clip
        if ctx.spent:
            clip.guard.fail(ran_twice(clip.layer))
        ctx.spent = True
        g = clip.layer.arguments.rows(g, ctx.count)
        scope: Scope = ctx.scope
        use = clip.use(g, ctx.graph, ctx.saved_tensors, scope.target, ctx.needs_input_grad[4:])
        ctx.graph = None
        return None, None, None, None, *scope.arrive(use)


@torch._dynamo.allow_in_graph
def _traced(
    key: str,
    index: int,
    y: Tensor,
    norms: Tensor,
    present: Tensor | None,
    counters: Counters,
    token: Tensor | None,
    public: tuple[Tensor, ...],
    count: int,
    *tensors: Tensor | None,
) -> Tensor:
    """Attach the node of a layer while the graph is traced, with the trace's tensors.

    Args:
        key: the budget's key.
        index: the index of the layer's clip in the budget.
        y: the layer's output.
        norms: the norms of the target.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
        counters: the tensors to which the layer's scopes send a 1.
        token: the token of the forward pass, with a joint budget.
        public: the trace's own `NodeClip.public`.
        count: the number of the layer's trainable parameters.
        tensors: the sinks of the trainable parameters' sums, all of the layer's parameters, and
            its inputs.
    """
    budget = BUDGETS[key]
    clip: NodeClip = budget.clips[index]
    clip.guard.require(changed_layer(clip.layer))
    clip.guard.require(replaced_parameter(clip.layer))
    clip.guard.check_precision(clip.layer.name, y.dtype)
    inputs = clip.layer.arguments.get(tensors[count + len(clip.layer.module._parameters) :], {})
    rows = clip.guard.examples if budget.rows is None else budget.rows
    if rows:
        clip.guard.require(wrong_batch(clip.layer, inputs, rows))
    module = clip.layer.module
    names = list(module._parameters)
    own = tensors[count : count + len(names)]
    target = clip.target._replace(norms=norms)
    sinks = cast("tuple[Tensor, ...]", tensors[:count])
    scope = budget.traced_scope(clip.layer, target, present, counters, token, sinks)
    before, clip.public = clip.public, public
    try:
        with parameters_replaced(module, dict(zip(names, own, strict=True))):
            call = clip._call(module, tensors[count + len(names) :], {}, y)
    finally:
        clip.public = before
    out = clip.attached(call, scope)
    scope.close()
    return out
