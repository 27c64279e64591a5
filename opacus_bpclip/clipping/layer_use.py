"""A use of a layer without closed forms: the layer's own autograd computes the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from opacus_bpclip.clipping.factors import Factors, Measured, measured
from opacus_bpclip.clipping.node import NodeClip
from opacus_bpclip.clipping.use import Clipped, FactorsOf, OwnUse, Sums, Use
from opacus_bpclip.rules import Inputs
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows
from opacus_bpclip.rules.precision import norm_dtype, wide


class Graph(NamedTuple):
    """The autograd graph of one call of a layer, held by edges, which keep no tensor alive.

    Attributes:
        y: the edge of the layer's output.
        leaves: the edges of its inputs; ``None`` for inputs without a gradient.
        parameters: the trainable parameters, by name.
        dtype: the dtype of the output.
        is_low: whether the graph computes in low precision, so that it may not sum over the batch.
    """

    y: GradientEdge
    leaves: tuple[GradientEdge | None, ...]
    parameters: Mapping[str, Tensor]
    dtype: torch.dtype
    is_low: bool


class LayerUse(Use):
    """A use of a layer whose own autograd computes the gradients.

    Args:
        clip: the clip of the layer.
        examples: the number that a mean loss has divided the upstream gradient by.
        g: upstream gradient, batch first.
        graph: the autograd graph of the call.
        norms: the norms of the inputs' columns, from `Rule.prepare`.
        finite: ``[B]`` bool, which examples are finite.
        scales: the factors of the inputs, batch first.
        inputs: the clipped inputs, batch first.
    """

    def __init__(
        self,
        clip: NodeClip,
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
        """Return the rule's bounds."""
        rule, g, norms = self.layer.rule, wide(self._g), self._norms
        return measured(
            self._bound.of(rule, g, self._inputs, norms, self._max_norm),
            where_needed(self._finite),
            size=lambda: self._bound.size(rule, g, norms),
            examples=self.examples,
        )

    def clip(self, factors_of: FactorsOf) -> Clipped:
        """Compute all gradients in one backward pass through the layer."""
        factors = factors_of(self.measure())
        if all(leaf is None for leaf in self._graph.leaves):
            return Clipped(self.sums(factors), (None,) * len(self._graph.leaves))
        sums, inputs = self._gradients(self._scaled(factors), parameters=True, inputs=True)
        return Clipped({name: total * self.examples for name, total in sums.items()}, inputs)

    def sums(self, factors: Factors) -> Sums:
        """Run the layer's backward pass on scaled upstream gradients."""
        # Scale the upstream gradients: the sums may be larger.
        g = self._scaled(factors._replace(factor=factors.factor * self.examples))
        return self._gradients(g, parameters=True)[0]

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Run the layer's backward pass, for its inputs alone."""
        g = wide(self._g) if factors is None else self._scaled(factors)
        return self._gradients(g, inputs=True)[1]

    def has_changed(self) -> bool:
        """Return whether the upstream gradient was changed in place."""
        return self._g._version != self._version

    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples; unless the rule knows them, one by one."""
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
        """Return the gradients that the rule knows as products."""
        inputs = tuple(x if x is None else x[rows] for x in self._inputs)
        return self.layer.rule.products(wide(self._g[rows]), inputs)

    def by_example(self) -> OwnUse:
        """Return a use with per-example gradients, for a graph that may not sum over the batch."""
        own = self.own(slice(0, len(self._g)))
        joint = torch.cat([wide(gradient).flatten(1) for gradient in own.values()], dim=1)
        inputs = self.input_gradients(None)
        return OwnUse(self.layer, self.examples, joint, list(own), inputs=inputs)

    def _scaled(self, factors: Factors) -> Tensor:
        by, keep = factors
        g = wide(self._g)
        return zero_rows(g * per_row(by, g), keep)

    def _gradients(
        self, g: Tensor, *, parameters: bool = False, inputs: bool = False
    ) -> tuple[Sums, tuple[Tensor | None, ...]]:
        y, leaves, own, dtype, _ = self._graph
        of = dict(own) if parameters else {}
        asked = [leaf for leaf in leaves if leaf is not None] if inputs else []
        found: list[Tensor | None] = []
        if of or asked:
            g = self.layer.arguments.as_passed(g).to(dtype)
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
