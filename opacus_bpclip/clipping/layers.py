"""Any other layer with a rule: its own autograd makes the gradients, on a graph that is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.clipping.base import Settings
from opacus_bpclip.clipping.factors import Factors, Measured, Target, measured
from opacus_bpclip.clipping.node import Call, NodeClip, parameters_replaced
from opacus_bpclip.clipping.use import Clipped, FactorsOf, Sums, Use
from opacus_bpclip.guard.call_checks import foreign_parameter, replaced_parameter, went_around
from opacus_bpclip.model.calls import Args, Kwargs
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Inputs
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows
from opacus_bpclip.rules.precision import is_low, norm_dtype, wide
from opacus_bpclip.rules.scaling import prepare_inputs


class Graph(NamedTuple):
    """What the layer's own autograd goes through: edges, so that no tensor is kept for them.

    Attributes:
        y: the layer's output.
        leaves: its inputs, as the layer has them; ``None`` for those without a gradient.
        parameters: the trainable ones, by name.
    """

    y: GradientEdge
    leaves: tuple[GradientEdge | None, ...]
    parameters: Mapping[str, Tensor]


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
        low = is_low(y.dtype)
        given_inputs = arguments.get(args, kwargs)
        inputs = tuple(wide(x) for x in given_inputs) if low else given_inputs
        prepared = prepare_inputs(inputs, rule, self.config.max_input_norm)
        silenced = rule.silenced(prepared)
        passed = arguments.passed(args, kwargs)
        leaves = tuple(x if x is not None and x.requires_grad else None for x in passed)
        traced = torch.compiler.is_compiling()
        made = y
        # Where a graph is traced there is no memory to compare.
        changed = traced or not _are_alike(silenced, inputs)
        # One of several inputs may be made from another, or be the same: each needs a leaf.
        several = sum(leaf is not None for leaf in leaves) > 1
        if several or low or changed:
            given = [x if x is None else arguments.as_passed(x).detach() for x in silenced]
            leaves = tuple(
                None if leaf is None or x is None else x.requires_grad_()
                for leaf, x in zip(leaves, given, strict=True)
            )
            args, kwargs = arguments.replaced(args, kwargs, tuple(given))
            if traced or low:
                present = {name: _present(module, name) for name in self.layer.named_parameters}
                self.stand_ins = _stand_ins({name: wide(p) for name, p in present.items()})
            others = {name: wide(p) for name, p in module._parameters.items()} if low else {}
            with parameters_replaced(module, {**others, **self.stand_ins}):
                made = module.forward(*args, **kwargs)
            if changed or not low:
                y = made.to(y.dtype)
        keep = where_needed(prepared.finite)
        out = y.detach()
        if keep is not None:
            # Zeros where the layer multiplies; nobody may take those for an output.
            rows = out.movedim(arguments.batch_axis, 0)
            rows = torch.where(per_row(keep, rows), rows, float("nan"))
            out = rows.movedim(0, arguments.batch_axis)
        elif traced:
            out = out.clone()
        graph = None
        if made.requires_grad:
            if self.followed:
                own = (*self.stand_ins.values(), *leaves)
                self.guard.require(foreign_parameter(self.layer, made, own))
            edges = (None if leaf is None else get_gradient_edge(leaf) for leaf in leaves)
            graph = Graph(get_gradient_edge(made), tuple(edges), self.stand_ins)
        norms = None if prepared.norms is None else zero_rows(prepared.norms, keep)
        scales = tuple(x if x is None else zero_rows(x, keep) for x in prepared.scales)
        scales = scales or (None,) * len(inputs)
        detached = tuple(x if x is None else x.detach() for x in silenced)
        return Call(out, passed, (norms, prepared.finite, *scales, *detached), graph)

    def use(
        self, g: Tensor, graph: Any, saved: Inputs, target: Target, wants: tuple[bool, ...]
    ) -> Use:
        """Take the upstream gradient that has arrived."""
        norms, finite, *rest = saved
        assert finite is not None
        count = len(wants)
        examples = self.examples_of(g, graph)
        scales, inputs = list(rest[:count]), tuple(rest[count:])
        return LayerUse(self, examples, g, graph, norms, finite, scales, inputs)


class LayerUse(Use):
    """A use of a layer whose own autograd makes the gradients.

    Args:
        clip: of the layer.
        examples: by what a mean loss has divided the upstream gradient.
        g: upstream gradient, batch first.
        graph: the layer's.
        norms: of the inputs' columns, as the rule has them.
        finite: ``[B]`` bool, which examples are finite.
        scales: by what the inputs were multiplied, batch first.
        inputs: as they were clipped, batch first.
    """

    def __init__(
        self,
        clip: LayerClip,
        examples: int,
        g: Tensor,
        graph: Graph,
        norms: Tensor | None,
        finite: Tensor,
        scales: list[Tensor | None],
        inputs: Inputs,
    ) -> None:
        self.layer, self.examples = clip.layer, examples
        self._bound, self._max_norm = clip.bound, clip.config.max_input_norm
        self._g, self._graph, self._norms, self._finite = g, graph, norms, finite
        self._scales, self._inputs = scales, inputs
        self._version = g._version

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""
        return norm_dtype(self._g.dtype)

    def measure(self) -> Measured:
        """Bound the gradients as the rule does."""
        rule, g, norms = self.layer.rule, wide(self._g), self._norms
        return measured(
            self._bound.of(rule, g, self._inputs, norms, self._max_norm),
            where_needed(self._finite),
            size=lambda: self._bound.size(rule, g, norms),
            examples=self.examples,
        )

    def clip(self, factors_of: FactorsOf) -> Clipped:
        """Make all gradients in one backward pass."""
        factors = factors_of(self.measure())
        if all(leaf is None for leaf in self._graph.leaves):
            return Clipped(self.sums(factors), (None,) * len(self._graph.leaves))
        sums, inputs = self._gradients(self._scaled(factors), parameters=True, inputs=True)
        return Clipped({name: total * self.examples for name, total in sums.items()}, inputs)

    def sums(self, factors: Factors) -> Sums:
        """Run the layer's backward pass on scaled upstream gradients."""
        # Not the sums afterwards, which may be larger than the upstream gradients.
        g = self._scaled(factors._replace(factor=factors.factor * self.examples))
        return self._gradients(g, parameters=True)[0]

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Run the layer's backward pass, for its inputs alone."""
        g = wide(self._g) if factors is None else self._scaled(factors)
        return self._gradients(g, inputs=True)[1]

    def has_changed(self) -> bool:
        """Return whether somebody has changed the upstream gradient in place."""
        return self._g._version != self._version

    def own(self, rows: slice) -> Sums:
        """Make the gradients of some examples; at worst by a backward pass for each."""
        known = self.layer.rule.by_example(
            wide(self._g[rows]), tuple(x if x is None else x[rows] for x in self._inputs)
        )
        if known:
            return known
        if not self._g[rows].shape[0]:
            own = self.layer.named_parameters.items()
            return {name: wide(p).new_zeros((0, *p.shape)) for name, p in own}
        found: dict[str, list[Tensor]] = {}
        for row in range(*rows.indices(len(self._g))):
            alone = torch.zeros_like(self._g, dtype=self.dtype)
            alone[row] = self._g[row]
            for name, gradient in self._gradients(alone, parameters=True)[0].items():
                found.setdefault(name, []).append(gradient)
        return {name: torch.stack(own) for name, own in found.items()}

    def matrices(self, rows: slice) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return what the rule knows for a product."""
        inputs = tuple(x if x is None else x[rows] for x in self._inputs)
        return self.layer.rule.products(wide(self._g[rows]), inputs)

    def _scaled(self, factors: Factors) -> Tensor:
        by, keep = factors
        g = wide(self._g)
        return zero_rows(g * per_row(by, g), keep)

    def _gradients(
        self, g: Tensor, *, parameters: bool = False, inputs: bool = False
    ) -> tuple[Sums, tuple[Tensor | None, ...]]:
        y, leaves, own = self._graph
        of = dict(own) if parameters else {}
        asked = [leaf for leaf in leaves if leaf is not None] if inputs else []
        found: list[Tensor | None] = []
        if of or asked:
            g = g.movedim(0, self.layer.arguments.batch_axis)
            found = list(
                torch.autograd.grad(
                    [y],
                    [*of.values(), *asked],  # type: ignore[arg-type]
                    [g],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        sums = {
            name: torch.zeros_like(parameter) if total is None else total
            for (name, parameter), total in zip(of.items(), found[: len(of)], strict=True)
        }
        rest = iter(found[len(of) :])
        made = tuple(None if leaf is None or not inputs else next(rest) for leaf in leaves)
        return sums, tuple(
            dx if dx is None or scale is None else dx * self.layer.arguments.as_passed(scale)
            for dx, scale in zip(made, self._scales, strict=True)
        )


def _are_alike(some: Inputs, others: Inputs) -> bool:
    """Return whether the inputs are the same numbers in the same memory."""
    pairs = zip(some, others, strict=True)
    return all(x is None or (y is not None and x.is_set_to(y)) for x, y in pairs)


def _stand_ins(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


def _present(module: nn.Module, name: str) -> Tensor:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter
