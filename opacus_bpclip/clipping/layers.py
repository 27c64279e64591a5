"""Clip layers that have a rule but no closed form, by their own autograd on a detached graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.factors import Target
from opacus_bpclip.clipping.layer_use import Graph, LayerUse
from opacus_bpclip.clipping.node import Call, NodeClip
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.guard.call_checks import replaced_parameter, unknown_parameter, went_around
from opacus_bpclip.guard.precision import low_in_a_graph
from opacus_bpclip.model.calls import Args, Kwargs, parameters_replaced
from opacus_bpclip.model.graphs import low_precision_behind
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Inputs
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows
from opacus_bpclip.rules.precision import is_low, wide
from opacus_bpclip.rules.scaling import prepare_inputs


class LayerClip(NodeClip):
    """Clips one layer whose gradients its own autograd computes."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        self.changes_output = self.config.max_input_norm is not None and layer.rule.clips_input
        # Detached leaves that replace the parameters while the layer runs, so that the layer's
        # graph ends there. With the parameters, their hooks could change the sums.
        self.own_leaves: dict[str, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        restore = self.layer.module.register_forward_hook(self.restore, always_call=True)
        return [*super().attach(), restore]

    def enter(self, module: nn.Module, args: Args) -> None:
        """Replace the parameters by detached leaves."""
        super().enter(module, args)
        self.own_leaves = {}
        if self.passed_by:
            return
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.guard.require(replaced_parameter(self.layer))
            self.own_leaves = _leaves_of(self.layer.named_parameters)
            for leaf in self.own_leaves.values():
                leaf.register_post_accumulate_grad_hook(self.went_around)
            module._parameters.update(self.own_leaves)  # type: ignore[arg-type]

    def went_around(self, _: Tensor) -> None:
        """Refuse a gradient that reaches the layer's parameters on a way around its node."""
        self.guard.fail(went_around(self.layer))

    def restore(self, module: nn.Module, args: Args, output: Any) -> None:
        """Put the parameters back, also after an error."""
        if self.own_leaves:
            module._parameters.update(self.layer.named_parameters)

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Put the parameters back, and replace the layer's graph by the node."""
        self.restore(module, args, y)
        out = super().leave(module, args, kwargs, y)
        self.own_leaves = {}
        return out

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Clip the inputs; run the layer again if that changed them, or in low precision."""
        arguments, rule = self.layer.arguments, self.layer.rule
        passed = arguments.passed(args, kwargs)
        inputs = arguments.get(args, kwargs)
        ends = {x.grad_fn for x in passed if x is not None}
        low = is_low(y.dtype) or low_precision_behind([y.grad_fn], ends) is not None
        widened = low and self._can_be_widened(module, args, kwargs)
        if widened:
            inputs = tuple(wide(x) for x in inputs)
        prepared = prepare_inputs(inputs, rule, self.config.max_input_norm)
        silenced = rule.silenced(prepared)
        leaves = tuple(x if x is not None and x.requires_grad else None for x in passed)
        traced = torch.compiler.is_compiling()
        made = y
        # Tensors in a trace have no memory that could be compared.
        changed = traced or not _same_memory(silenced, inputs)
        # One input may be computed from another, or be the same tensor: each needs its own leaf.
        several = sum(leaf is not None for leaf in leaves) > 1
        if several or widened or changed:
            given = [x if x is None else arguments.as_passed(x).detach() for x in silenced]
            leaves = tuple(
                None if leaf is None or x is None else x.requires_grad_()
                for leaf, x in zip(leaves, given, strict=True)
            )
            args, kwargs = arguments.replaced(args, kwargs, tuple(given))
            own = dict(module._parameters)
            if widened:
                own = {name: wide(p) for name, p in own.items()}  # type: ignore[misc]
            if traced or widened:
                trained = {name: _present(own, name) for name in self.layer.named_parameters}
                self.own_leaves = _leaves_of(trained)
            with parameters_replaced(module, {**own, **self.own_leaves}):
                made = module.forward(*args, **kwargs)
            ends = set()
        keep = where_needed(prepared.finite)
        out = made.detach().to(y.dtype)
        if keep is not None:
            # The layer computed these rows from zeros. The output must not look valid.
            rows = arguments.rows(out)
            rows = torch.where(per_row(keep, rows), rows, float("nan"))
            out = arguments.as_passed(rows)
        elif traced:
            out = out.clone()
        graph = self._graph(made, leaves, ends) if made.requires_grad else None
        norms = None if prepared.norms is None else zero_rows(prepared.norms, keep)
        scales = tuple(x if x is None else zero_rows(x, keep) for x in prepared.scales)
        scales = scales or (None,) * len(inputs)
        detached = tuple(x if x is None else x.detach() for x in silenced)
        return Call(out, passed, (norms, prepared.finite, *scales, *detached), graph)

    def _can_be_widened(self, module: nn.Module, args: Args, kwargs: Kwargs) -> bool:
        """Return whether the layer computes with nothing but its parameters and its inputs."""
        given = sum(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        known = sum(x is not None for x in self.layer.arguments.passed(args, kwargs))
        return given == known and not module._modules and not module._buffers

    def _graph(self, made: Tensor, leaves: Inputs, ends: set[Node | None]) -> Graph:
        """Return the layer's own graph, and refuse low precision where it must sum over the batch.

        In eager mode a graph in low precision is used example by example instead.
        """
        if self.followed:
            own = (*self.own_leaves.values(), *leaves)
            self.guard.require(unknown_parameter(self.layer, made, own))
        dtype = low_precision_behind([made.grad_fn], ends)
        if dtype is not None:
            self.guard.check_precision(self.layer.name, dtype)
            if torch.compiler.is_compiling():
                self.guard.fail(low_in_a_graph(self.layer, dtype))
        edges = tuple(None if leaf is None else get_gradient_edge(leaf) for leaf in leaves)
        return Graph(get_gradient_edge(made), edges, self.own_leaves, made.dtype, dtype is not None)

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Return the use for the upstream gradient that has arrived."""
        norms, finite, *rest = saved
        assert finite is not None
        count = len(wants)
        examples = self.examples_of(g, graph)
        scales, inputs = list(rest[:count]), tuple(rest[count:])
        use = LayerUse(self, examples, g, graph, norms, finite, scales, inputs)
        return use.by_example() if graph.is_low else use


def _same_memory(some: Inputs, others: Inputs) -> bool:
    """Return whether both hold the same tensors, in the same memory."""
    pairs = zip(some, others, strict=True)
    return all(x is None or (y is not None and x.is_set_to(y)) for x, y in pairs)


def _leaves_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def _present(parameters: Mapping[str, Tensor | None], name: str) -> Tensor:
    parameter = parameters[name]
    assert parameter is not None
    return parameter
