"""Measure and sum the gradients of one call of a function on parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from opacus_bpclip.clipping.factors import Factors, Measured, Target, measured
from opacus_bpclip.clipping.function_rules import RuledCall, rule_of_call
from opacus_bpclip.clipping.use import Sums, Use
from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.function_checks import changed_argument
from opacus_bpclip.model.known_gradients import SUMS_AND_COPIES
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.own_gradients import leaves_behind, own_gradients, sent_back
from opacus_bpclip.model.plan import Template
from opacus_bpclip.rules.base import per_row, where_needed, zero_rows
from opacus_bpclip.rules.cancellation import cancellation_factor
from opacus_bpclip.rules.exact_norms import chunks
from opacus_bpclip.rules.norms import row_norms
from opacus_bpclip.rules.precision import norm_dtype, wide

# Upper limits in bytes: for the gradients of a chunk of examples, and for gradients that are kept
# until their factors are known.
_CHUNK = 32 * 2**20
_KEPT = 2**20


@dataclass
class FunctionGraph:
    """A call with an autograd graph of its own, which is detached from the model's.

    Attributes:
        call: the call, on detached tensors.
        template: the places of the batch in its arguments and results.
        results: the gradient edges of its flattened results, which keep no tensor alive; ``None``
            for results without a gradient.
        versions: the versions of the arguments at the call.
        examples: the number of examples in the call.
    """

    call: FunctionCall
    template: Template
    results: list[GradientEdge | None]
    versions: tuple[int, ...]
    examples: int

    @property
    def inputs(self) -> list[Tensor]:
        """Return the arguments that hold the batch."""
        return [
            x
            for x, place in zip(self.call.leaves, self.template.arguments, strict=True)
            if place is not None and isinstance(x, Tensor)
        ]

    def input_gradients(self, upstream: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
        """Return the gradients of some arguments, ``None`` for those that require none.

        Args:
            upstream: the gradients of the results that hold the batch, ``[B, *]``.
            inputs: the arguments.
        """
        asked = [x for x in inputs if x.requires_grad]
        ends, sent = [], []
        for (edge, place), g in zip(self.template.placed(self.results), upstream, strict=True):
            ends.append(edge)
            sent.append(place.put_back(g))
        found = iter(
            torch.autograd.grad(ends, asked, sent, retain_graph=True, allow_unused=True)
            if asked
            else ()
        )
        return [next(found) if x.requires_grad else None for x in inputs]

    @property
    def has_changed(self) -> bool:
        """Return whether an argument that the gradients depend on was changed in place."""
        return self.reads_arguments and self.versions != versions_of(self.call.leaves)

    @property
    def reads_arguments(self) -> bool:
        """Return whether the gradients depend on the values of the arguments."""
        return self.template.method != "known" or self.call.name not in SUMS_AND_COPIES


def versions_of(leaves: Sequence[Any]) -> tuple[int, ...]:
    """Return autograd's version of each tensor, which counts changes in place."""
    return tuple(x._version for x in leaves if isinstance(x, Tensor))


class FunctionUse(Use):
    """One call of a function, as a use of one layer's parameters.

    Args:
        layer: the layer.
        examples: the number that a mean loss has divided the upstream gradients by.
        graph: the call.
        upstream: the gradients of the results that hold the batch, each ``[B, *]``.
        names: by the index of an argument, the names in the layer of the parameters that the
            argument is computed from; ``None`` for another layer's parameter.
        inputs: the gradients of the arguments that hold the batch.
        target: the norm that gradients are scaled to.
        fail: raises an error with the given message.
    """

    def __init__(
        self,
        layer: Layer,
        examples: int,
        graph: FunctionGraph,
        upstream: Sequence[Tensor],
        names: Mapping[int, Sequence[str | None]],
        inputs: tuple[Tensor | None, ...],
        target: Target,
        fail: Callable[[str], None],
    ) -> None:
        self._target, self._fail = target, fail
        self.layer, self.examples = layer, examples
        self._graph, self._upstream, self._names = graph, upstream, names
        self._inputs = inputs
        self._own_of_values = own_gradients(
            graph.call,
            graph.template,
            graph.results,
            upstream,
            graph.examples,
        )
        self._kept: Sums | None = None
        self._cancellation: Tensor | None = None
        owned = all(None not in own and own for own in names.values())
        self._ruled = rule_of_call(graph.call, graph.template, upstream) if owned else None
        self._versions = versions_of(upstream)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""
        return norm_dtype(self.layer.parameters[0].dtype)

    def measure(self) -> Measured:
        """Return the norms of the per-example gradients, computed for a chunk at a time."""
        if self._graph.has_changed:
            self._fail(changed_argument(self._graph.call))
        if self._ruled is not None:
            return self._measured_by_rule(self._ruled)
        norms, made = [], list[Sums]()
        keeps = self._bytes() * len(self._upstream[0]) <= _KEPT
        for rows in self._chunks():
            own = self._made(rows)
            norms.append(_norm(own))
            if keeps:
                made.append(own)
        if keeps:
            self._kept = {name: torch.cat([own[name] for own in made]) for name in made[0]}
        bound = torch.cat(norms)
        self._cancellation = self._cancellation_of(bound)
        return measured(bound * self._cancellation, None, examples=self.examples)

    def _cancellation_of(self, bound: Tensor) -> Tensor:
        """Return the factors that suppress gradients which are only rounding error. ``[B]``."""
        cancelled = torch.stack([row_norms(g) for g in self._upstream]).sum(dim=0)
        if self._graph.reads_arguments:
            given = self._graph.template.given(self._graph.call.leaves, self._graph.examples)
            floats = [row_norms(x).square() for x in given if x.is_floating_point()]
            one = torch.ones_like(cancelled)
            cancelled = cancelled * torch.stack([one, *floats]).sum(dim=0).sqrt()
        limit = self._target.unscaled() / max(self.examples, 1)
        return cancellation_factor(bound, cancelled, self._upstream[0].dtype, limit)

    def sums(self, factors: Factors) -> Sums:
        """Return the sums of the gradients that have been measured, times their factors."""
        by, keep = factors
        if self._ruled is not None and keep is None:
            return self._sums_in_one(
                by if self._cancellation is None else by * self._cancellation.to(by.dtype)
            )
        sums: dict[str, Tensor] = {}
        for rows in self._chunks():
            few = None if keep is None else keep[rows]
            for name, own in self.own(rows).items():
                flat = zero_rows(own.reshape(len(own), own.shape[1:].numel()), few)
                total = (by[rows].to(flat.dtype) @ flat).view(own.shape[1:]) * self.examples
                sums[name] = sums[name] + total if name in sums else total
        return sums

    def _measured_by_rule(self, ruled: RuledCall) -> Measured:
        graph = self._graph
        prepared = ruled.prepared(graph.call.leaves, graph.template, graph.examples)
        g = ruled.rows(self._upstream[0])
        bound = ruled.rule.exact(g, prepared.inputs, prepared.norms)
        self._cancellation = self._cancellation_of(bound)
        return measured(
            bound,
            where_needed(prepared.finite),
            size=lambda: ruled.rule.size(g, prepared.norms),
            examples=self.examples,
        )

    def _sums_in_one(self, by: Tensor) -> Sums:
        """Send scaled upstream gradients through the call's graph."""
        (g,) = self._upstream
        scaled = g * per_row((by * self.examples).to(g.dtype), g)
        graph = self._graph
        values = [graph.call.leaves[index] for index in graph.call.made]
        found = graph.input_gradients([scaled], values)
        names = (self._names[index][0] for index in graph.call.made)
        return {
            name: torch.zeros_like(value) if total is None else total
            for name, value, total in zip(names, values, found, strict=True)
            if name is not None
        }

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments that hold the batch."""
        assert factors is None  # The gradients of the inputs are not clipped.
        return self._inputs

    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples, with rounding errors suppressed."""
        made = self._made(rows)
        if self._cancellation is None:
            return made
        factor = self._cancellation[rows]
        return {name: own * per_row(factor.to(own.dtype), own) for name, own in made.items()}

    def _made(self, rows: slice) -> Sums:
        """Compute some examples' gradients of the call's arguments, then of the parameters."""
        if self._kept is not None:
            return {name: own[rows] for name, own in self._kept.items()}
        found: dict[str, Tensor] = {}
        graph = self._graph
        values = zip(graph.call.made.items(), self._own_of_values(rows), strict=True)
        for (index, made), gradient in values:
            names = self._names[index]
            if not any(names):
                continue
            for name, own in zip(
                names,
                sent_back(made.value, gradient, batched=graph.template.batched),
                strict=True,
            ):
                if name is not None:
                    found[name] = found[name] + wide(own) if name in found else wide(own)
        return found

    def has_changed(self) -> bool:
        """Return whether the upstream gradients or the arguments were changed in place."""
        changed = self._graph.has_changed or versions_of(self._upstream) != self._versions
        return self._kept is None and changed

    def _chunks(self) -> Any:
        return chunks(len(self._upstream[0]), max(1, _CHUNK // max(1, self._bytes())))

    def _bytes(self) -> int:
        """Return the bytes of temporary memory that one example takes."""
        values = [made.value for made in self._graph.call.made.values()]
        behind = [leaf for value in values for leaf in leaves_behind(value)]
        sizes = sum(x.numel() for x in (*values, *behind))
        given = (*self._upstream, *self._graph.inputs)
        return 4 * (sizes + sum(x.numel() // max(1, self._graph.examples) for x in given))


def _norm(own: Sums) -> Tensor:
    norms = [row_norms(gradient) for gradient in own.values()]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0)
