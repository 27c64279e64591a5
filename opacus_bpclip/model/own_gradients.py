"""Per-example gradients of a function's arguments that were computed from parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.graphs import leaves_of
from opacus_bpclip.model.known_gradients import known_gradients
from opacus_bpclip.model.plan import Template

# Returns some examples' gradients of each value: ``[b, *value.shape]``.
OwnGradients = Callable[[slice], tuple[Tensor, ...]]


def own_gradients(
    call: FunctionCall,
    template: Template,
    results: Sequence[Any],
    upstream: Sequence[Tensor],
    examples: int,
) -> OwnGradients:
    """Return a function that computes the gradients of some examples at a time.

    Args:
        call: the call, on detached tensors.
        template: the places of the batch, and the method for the gradients.
        results: the results of the call, or their gradient edges; used by the method ``"graph"``.
        upstream: the gradients of the results that hold the batch, each ``[B, *]``, in the shape
            of `Place.rows`.
        examples: the number of examples ``B``.
    """
    values = [call.leaves[index] for index in call.made]
    if template.method == "graph":
        return _of_graph(template, results, values, upstream)
    given = template.given(call.leaves, examples)
    if template.method == "known":
        known = known_gradients(call, template)
        assert known is not None
        return lambda rows: known([x[rows] for x in given], upstream[0][rows])
    detached = [value.detach() for value in values]

    def of_one(rows: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def on_values(*own: Tensor) -> tuple[Tensor, ...]:
            return call.of_example(template, rows, own)

        pulled: Any = torch.func.vjp(on_values, *detached)
        made, pull_back = pulled
        return tuple(pull_back(tuple(g.to(y.dtype) for g, y in zip(gradients, made, strict=True))))

    def alone(rows: slice) -> tuple[Tensor, ...]:
        found = [
            of_one([x[row] for x in given], [g[row] for g in upstream])
            for row in range(*rows.indices(examples))
        ]
        return tuple(map(torch.stack, zip(*found, strict=True)))

    def together(rows: slice) -> tuple[Tensor, ...]:
        parts = [x[rows] for x in given], [g[rows] for g in upstream]
        made: tuple[Tensor, ...] = torch.func.vmap(of_one)(*parts)
        return made

    def none(values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(value.new_zeros((0, *value.shape)) for value in values)

    method = together if template.method == "vmap" else alone
    return lambda rows: method(rows) if len(upstream[0][rows]) else none(values)


def _of_graph(
    template: Template,
    results: Sequence[Any],
    values: Sequence[Tensor],
    upstream: Sequence[Tensor],
) -> OwnGradients:
    """Run the call's own graph backward once for each example."""
    placed = template.placed(results)

    def of(rows: slice) -> tuple[Tensor, ...]:
        found: list[tuple[Tensor, ...]] = []
        for row in range(*rows.indices(len(upstream[0]))):
            sent, ends = [], []
            for (x, place), g in zip(placed, upstream, strict=True):
                only = torch.zeros_like(g)
                only[row] = g[row]
                sent.append(place.put_back(only))
                ends.append(x)
            made = torch.autograd.grad(ends, values, sent, retain_graph=True, allow_unused=True)
            found.append(
                tuple(
                    torch.zeros_like(value) if own is None else own
                    for own, value in zip(made, values, strict=True)
                )
            )
        if not found:
            return tuple(value.new_zeros((0, *value.shape)) for value in values)
        return tuple(map(torch.stack, zip(*found, strict=True)))

    return of


def leaves_behind(value: Tensor) -> list[Tensor]:
    """Return the leaves that a tensor was computed from, or a leaf itself, in a fixed order."""
    return [value] if value.grad_fn is None else list(leaves_of(value))


def sent_back(value: Tensor, own: Tensor, *, batched: bool) -> list[Tensor]:
    """Propagate per-example gradients of a tensor back to the leaves that it was computed from.

    Args:
        value: the tensor.
        own: the per-example gradients, ``[b, *value.shape]``, in the tensor's dtype or a wider one.
        batched: whether to propagate them together, or one by one.

    Returns:
        ``[b, *leaf.shape]`` for each leaf, in the order of `leaves_behind`, in either dtype.
    """
    if value.grad_fn is None:
        return [own]
    own = own.to(value.dtype)
    leaves = leaves_behind(value)
    if not len(own):
        return [leaf.new_zeros((0, *leaf.shape)) for leaf in leaves]

    def back(gradient: Tensor, *, together: bool) -> list[Tensor]:
        found = torch.autograd.grad(
            [value],
            leaves,
            [gradient],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=together,
        )
        rows = gradient.shape[:1] if together else ()
        return [
            leaf.new_zeros((*rows, *leaf.shape)) if g is None else g
            for leaf, g in zip(leaves, found, strict=True)
        ]

    if batched:
        return back(own, together=True)
    return list(map(torch.stack, zip(*(back(row, together=False) for row in own), strict=True)))
