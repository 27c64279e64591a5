"""Clip the functions that a model calls on parameters outside of layers with a rule.

A call whose arguments hold examples runs on an autograd graph of its own, as do calls that compute
something from parameters alone. One node replaces the call in the model's graph. It computes the
gradients of the call's inputs, and hands the parameters' gradients to the scopes of their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.function_use import FunctionGraph, FunctionUse, versions_of
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.guard.call_checks import ran_twice
from opacus_bpclip.guard.weak import weakly
from opacus_bpclip.model import function_checks
from opacus_bpclip.model.coverage import unclipped_inputs
from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.functions import ParameterFunctions
from opacus_bpclip.model.graphs import low_precision_behind
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.own_gradients import leaves_behind
from opacus_bpclip.model.plan import CallKey, Plan, Template
from opacus_bpclip.rules.first_order import first_order
from opacus_bpclip.rules.precision import full_precision, wide


class Functions:
    """Follows the functions that one model calls on parameters.

    Args:
        layers: the trainable layers, by name.
        settings: the settings of the clipping.
    """

    def __init__(self, layers: Mapping[str, Layer], settings: Settings) -> None:
        self.layers = layers
        self.settings = settings
        self.followed = settings.followed

    def begin(self, plan: Plan, without_examples: Iterable[Tensor] = ()) -> None:
        """Begin a forward pass.

        Args:
            plan: what the trial on made-up examples has found about such a pass.
            without_examples: the model's arguments that hold no examples.
        """
        self.end()
        max_input_norm = self.settings.config.max_input_norm
        self.settings.guard.require(unclipped_inputs(self.layers, plan.passed_by, max_input_norm))
        self.followed.plan = plan
        # Added to, not replaced: a compiled graph may be of another form than this batch.
        self.settings.guard.by_functions |= {
            parameter
            for name in plan.layers | plan.passed_by
            for parameter in self.layers[name].parameters
        }
        if plan.layers:
            self.followed.mode = _Following(self, plan)
            self.followed.mode.note_arguments(without_examples)
            self.followed.mode.__enter__()

    def end(self) -> None:
        """End a forward pass."""
        mode, self.followed.mode = self.followed.mode, None
        if isinstance(mode, _Following):
            mode.__exit__(None, None, None)
            mode.close()


class _Following(ParameterFunctions):
    """Follows one forward pass."""

    def __init__(self, functions: Functions, plan: Plan) -> None:
        layers, settings = functions.layers, functions.settings
        self._settings, self._plan, self._layers = settings, plan, layers
        self._guard = settings.guard
        super().__init__(
            {
                f"{name}.{own}": parameter
                for name in layers
                if name in plan.layers
                for own, parameter in layers[name].named_parameters.items()
            }
        )
        # By the id of the leaf that replaces a parameter: its layer, and its name there.
        self._owners: dict[int, tuple[Layer, str]] = {}
        for name, leaf in self.leaves.items():
            owner, _, own = name.rpartition(".")
            self._owners[id(leaf)] = layers[owner], own
            # Not a method: this object ends with the forward pass, and the leaf's graph does not.
            refuse = partial(_refuse_way_around, weakly(self._guard.fail), name)
            leaf.register_post_accumulate_grad_hook(refuse)
        self._scopes: dict[str, Scope] = {}
        self._times: dict[CallKey, int] = {}

    def close(self) -> None:
        """End the pass; the nodes in the graph keep what is still needed."""
        if not self._settings.budget.joint:
            for scope in self._scopes.values():
                scope.close()
        self._scopes = {}
        self.forget()

    def called(self, call: FunctionCall) -> Any:
        """Run a call. If its arguments hold examples, replace it by a node in the graph."""
        template = self._template(call)
        if template is None:
            result = self.derive(call)
            if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(result)):
                self._guard.fail(function_checks.unseen(call))
            return result
        if not template.holds_batch:
            if self.is_of_shared(call):
                self._guard.fail(function_checks.shared_argument(call))
            return self.derive(call)
        examples = self._guard.examples
        self._guard.require(function_checks.wrong_places(call, template, examples))
        result, graph = self._on_private_graph(call, template, examples)
        leaves, spec = pytree.tree_flatten(result)
        outs = [index for index, x in enumerate(leaves) if _has_gradient(x)]
        self._guard.require(function_checks.wrong_results(call, template, leaves, examples))
        leaves = call.as_computed(leaves, drawn=template.method == "graph")
        for index in outs:
            self._guard.check_precision(function_checks.names_of(call), leaves[index].dtype)
        made = self._attached(graph, [leaves[index] for index in outs], call)
        for index, out in zip(outs, made, strict=True):
            leaves[index] = out
        if not call.is_in_place:
            return pytree.tree_unflatten(leaves, spec)
        call.leaves[0].copy_(leaves[0])
        return None if call.name == "__setitem__" else call.leaves[0]

    def _template(self, call: FunctionCall) -> Template | None:
        templates = self._plan.templates.get(call.key)
        if templates is None:
            return None
        if len(templates) == 1:
            return templates[0]
        time = self._times.get(call.key, 0)
        self._times[call.key] = time + 1
        if time >= len(templates):
            self._guard.fail(function_checks.unseen(call))
        return templates[time]

    def _on_private_graph(
        self, call: FunctionCall, template: Template, examples: int
    ) -> tuple[Any, FunctionGraph]:
        arguments = [_cut_off(leaf) for leaf in call.leaves]
        if call.is_in_place:
            arguments[0] = _cut_off(call.leaves[0].clone())
        for index, made in call.made.items():
            arguments[index] = wide(made.value.detach()).requires_grad_()
        with torch.enable_grad(), full_precision():
            result = call.run(arguments)
        edges = [_edge(x) for x in pytree.tree_leaves(result)]
        # A result may have no gradient on this batch; then it needs no place.
        outputs = (None if e is None else p for e, p in zip(edges, template.outputs, strict=True))
        graph = FunctionGraph(
            replace(call, leaves=arguments),
            template._replace(outputs=tuple(outputs)),
            edges,
            versions_of(arguments),
            examples,
        )
        return result, graph

    def _attached(
        self, graph: FunctionGraph, results: Sequence[Tensor], call: FunctionCall
    ) -> tuple[Tensor, ...]:
        """Return the results, attached to the node."""
        names: dict[str, dict[int, list[str | None]]] = {}
        self._check_rounding(graph, call)
        for index, made in graph.call.made.items():
            behind = leaves_behind(made.value)
            if any(id(leaf) not in self._owners for leaf in behind):
                self._guard.fail(function_checks.lost_argument(call))
            owners = [self._owners[id(leaf)] for leaf in behind]
            for own in dict.fromkeys(layer.name for layer, _ in owners):
                names.setdefault(own, {i: [] for i in graph.call.made})[index] = [
                    name if owner.name == own else None for owner, name in owners
                ]
        layers = [self._layers[name] for name in names]
        scopes = []
        for layer in layers:
            scope = self._scope(layer)
            scope.enter(layer, self._settings.groups[layer.name])
            scopes.append(scope)
        inputs = [
            call.leaves[index]
            for index, place in enumerate(graph.template.arguments)
            if place is not None and isinstance(call.leaves[index], Tensor)
        ]
        tokens = [scope.token for scope in scopes]
        outs = _FunctionNode.apply(
            self._guard,
            self._settings.mean,
            graph,
            list(zip(layers, names.values(), scopes, strict=True)),
            results,
            len(tokens),
            *tokens,
            *inputs,
        )
        return tuple(outs)

    def _check_rounding(self, graph: FunctionGraph, call: FunctionCall) -> None:
        """Refuse low precision on the way back to the parameters if the loss is a mean."""
        if not self._guard.undoes_mean:
            return
        nodes = [made.value.grad_fn for made in graph.call.made.values()]
        nodes += [None if edge is None else edge.node for edge in graph.results]
        dtype = low_precision_behind(nodes)
        if dtype is not None:
            self._guard.check_precision(function_checks.names_of(call), dtype)

    def _scope(self, layer: Layer) -> Scope:
        if layer.name not in self._scopes:
            self._guard.enter_layer(layer)
            target = self._settings.targets[layer.name]
            self._scopes[layer.name] = self._settings.budget.scope_of(target, at_once=False)
        return self._scopes[layer.name]


def _refuse_way_around(fail: Callable[[str], None], name: str, _: Tensor) -> None:
    fail(function_checks.went_around(name))


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _edge(x: Any) -> GradientEdge | None:
    return get_gradient_edge(x) if _has_gradient(x) else None


def _cut_off(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return wide(leaf.detach()).requires_grad_(leaf.requires_grad)


class _FunctionNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        guard: Any,
        mean: bool,
        graph: FunctionGraph,
        uses: Sequence[Any],
        results: Sequence[Tensor],
        tokens: int,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.guard, ctx.mean, ctx.graph, ctx.uses = guard, mean, graph, uses
        ctx.tokens, ctx.spent = tokens, False
        return tuple(result.detach() for result in results)

    @staticmethod
    @first_order
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        graph: FunctionGraph = ctx.graph
        if ctx.spent:
            ctx.guard.fail(ran_twice(ctx.uses[0][0]))
        ctx.spent = True
        arrived = iter(gradients)
        upstream = []
        for edge, place in zip(graph.results, graph.template.outputs, strict=True):
            if edge is not None:
                assert place is not None
                upstream.append(wide(place.rows(next(arrived), graph.examples)))
        inputs = tuple(graph.input_gradients(upstream, graph.inputs))
        examples = graph.examples if ctx.mean else 1
        for layer, names, scope in ctx.uses:
            scope.arrive(
                FunctionUse(
                    layer,
                    examples,
                    graph,
                    upstream,
                    names,
                    inputs,
                    scope.target,
                    ctx.guard.fail,
                )
            )
        ctx.graph = None
        return (None,) * (6 + ctx.tokens) + inputs
