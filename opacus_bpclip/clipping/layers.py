"""Any other layer with a rule: its own autograd makes the gradients, on a graph that is cut off."""

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
from opacus_bpclip.clipping.node import Call, NodeClip, parameters_replaced
from opacus_bpclip.clipping.use import Use
from opacus_bpclip.guard.call_checks import replaced_parameter, unknown_parameter, went_around
from opacus_bpclip.guard.precision import low_in_a_graph
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.graphs import low_precision_behind
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Inputs
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows
from opacus_bpclip.rules.precision import is_low, wide
from opacus_bpclip.rules.scaling import prepare_inputs


class LayerClip(NodeClip):
    """Clips one layer whose gradient has no closed form here."""

    def __init__(self, layer: Layer, settings: Settings) -> None:
        super().__init__(layer, settings)
        self.changes_output = self.config.max_input_norm is not None and layer.rule.clips_input
        # What stands for the parameters while the layer runs, so that its graph ends there: a hook
        # on a parameter could change what the graph sends it.
        self.stand_ins: dict[str, Tensor] = {}

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        restore = self.layer.module.register_forward_hook(self.restore, always_call=True)
        return [*super().attach(), restore]

    def enter(self, module: nn.Module, args: Args) -> None:
        """Put tensors in the parameters' place."""
        super().enter(module, args)
        self.stand_ins = {}
        if self.passed_by:
            return
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.guard.require(replaced_parameter(self.layer))
            self.stand_ins = _stand_ins(self.layer.named_parameters)
            for stand_in in self.stand_ins.values():
                stand_in.register_post_accumulate_grad_hook(self.went_around)
            module._parameters.update(self.stand_ins)  # type: ignore[arg-type]

    def went_around(self, _: Tensor) -> None:
        """Refuse a gradient that comes to the layer by another way than its node."""
        self.guard.fail(went_around(self.layer))

    def restore(self, module: nn.Module, args: Args, output: Any) -> None:
        """Put the parameters back, also after an error."""
        if self.stand_ins:
            module._parameters.update(self.layer.named_parameters)

    def leave(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Tensor | None:
        """Put the parameters back, and the node in the place of the layer's graph."""
        self.restore(module, args, y)
        out = super().leave(module, args, kwargs, y)
        self.stand_ins = {}
        return out

    def call(self, module: nn.Module, args: Args, kwargs: Kwargs, y: Tensor) -> Call:
        """Clip the inputs; run the layer again where that or low precision asks for it."""
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
        # Where a graph is traced there is no memory to compare.
        changed = traced or not _are_alike(silenced, inputs)
        # One of several inputs may be made from another, or be the same: each needs a leaf.
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
                self.stand_ins = _stand_ins(trained)
            with parameters_replaced(module, {**own, **self.stand_ins}):
                made = module.forward(*args, **kwargs)
            ends = set()
        keep = where_needed(prepared.finite)
        out = made.detach().to(y.dtype)
        if keep is not None:
            # Zeros where the layer multiplies; nobody may take those for an output.
            rows = out.movedim(arguments.batch_axis, 0)
            rows = torch.where(per_row(keep, rows), rows, float("nan"))
            out = rows.movedim(0, arguments.batch_axis)
        elif traced:
            out = out.clone()
        graph = self._graph(made, leaves, ends) if made.requires_grad else None
        norms = None if prepared.norms is None else zero_rows(prepared.norms, keep)
        scales = tuple(x if x is None else zero_rows(x, keep) for x in prepared.scales)
        scales = scales or (None,) * len(inputs)
        detached = tuple(x if x is None else x.detach() for x in silenced)
        return Call(out, passed, (norms, prepared.finite, *scales, *detached), graph)

    def _can_be_widened(self, module: nn.Module, args: Args, kwargs: Kwargs) -> bool:
        """Return whether all that a layer computes with is its parameters and its inputs."""
        given = sum(isinstance(x, Tensor) for x in (*args, *kwargs.values()))
        known = sum(x is not None for x in self.layer.arguments.passed(args, kwargs))
        return given == known and not module._modules and not module._buffers

    def _graph(self, made: Tensor, leaves: Inputs, ends: set[Node | None]) -> Graph:
        """Return the layer's own graph; its gradients may not be summed in low precision."""
        if self.followed:
            own = (*self.stand_ins.values(), *leaves)
            self.guard.require(unknown_parameter(self.layer, made, own))
        dtype = low_precision_behind([made.grad_fn], ends)
        if dtype is not None:
            self.guard.check_precision(self.layer.name, dtype)
            if torch.compiler.is_compiling():
                self.guard.fail(low_in_a_graph(self.layer, dtype))
        edges = tuple(None if leaf is None else get_gradient_edge(leaf) for leaf in leaves)
        return Graph(get_gradient_edge(made), edges, self.stand_ins, made.dtype, dtype is not None)

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Take the upstream gradient that has arrived."""
        norms, finite, *rest = saved
        assert finite is not None
        count = len(wants)
        examples = self.examples_of(g, graph)
        scales, inputs = list(rest[:count]), tuple(rest[count:])
        use = LayerUse(self, examples, g, graph, norms, finite, scales, inputs)
        return use.by_example() if graph.is_low else use


def _are_alike(some: Inputs, others: Inputs) -> bool:
    """Return whether the inputs are the same numbers in the same memory."""
    pairs = zip(some, others, strict=True)
    return all(x is None or (y is not None and x.is_set_to(y)) for x, y in pairs)


def _stand_ins(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def _present(parameters: Mapping[str, Tensor | None], name: str) -> Tensor:
    parameter = parameters[name]
    assert parameter is not None
    return parameter
