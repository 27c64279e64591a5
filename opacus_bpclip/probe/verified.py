"""The check of a function's results and gradients, one example at a time, against the batch's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from opacus_bpclip.model.known_gradients import known_gradients
from opacus_bpclip.model.own_gradients import own_gradients, sent_back
from opacus_bpclip.model.plan import Template
from opacus_bpclip.probe import problems
from opacus_bpclip.probe.comparison import distance
from opacus_bpclip.probe.problems import Problem
from opacus_bpclip.probe.recorder import Seen


def verified(
    seen: Seen, template: Template, examples: int, tolerance: float
) -> tuple[Template, Problem | None]:
    """Return the template with a method for per-example gradients that passed the check.

    There are two comparisons. The function's result on each example alone must be the example's
    rows of the result on the batch. And each per-example gradient from the template's method must
    be autograd's for the whole call, when the other examples' upstream gradients are zero.

    Args:
        seen: a recorded call.
        template: where the call has the batch.
        examples: the number of examples.
        tolerance: the largest relative difference of equal numbers.

    Returns:
        The template, and what is wrong; ``None`` if a method passed.
    """
    names, name = ", ".join(sorted(seen.call.names)), seen.call.name
    if any(x.is_complex() for x in seen.results):
        return template, Problem("(root)", problems.of_complex_numbers(names, name))
    seen = _finite(seen, template, examples)
    upstream = _upstream(seen, template, examples)
    if not upstream:
        return template, Problem("(root)", problems.unlike_alone(names, name, "output", torch.inf))
    expected = _by_autograd(seen, template, upstream)
    if template.method != "graph":
        gap = _gap_of_results(seen, template, examples)
        if not gap <= tolerance:
            return template, Problem("(root)", problems.unlike_alone(names, name, "output", gap))
    methods: dict[str, Sequence[Any]] = {"vmap": ("vmap", "loop"), "graph": ("graph",)}
    if template.method == "vmap" and known_gradients(seen.call, template) is not None:
        methods["vmap"] = ("known", "vmap", "loop")
    gap = torch.inf
    for method in methods[template.method]:
        candidate = template._replace(method=method)
        own = own_gradients(seen.call, candidate, seen.results, upstream, examples)
        try:
            with warnings.catch_warnings():
                # For operations without a batching rule vmap warns, and is no faster than a loop.
                warnings.simplefilter("error")
                found = own(slice(None))
        except Exception:  # whatever the function raises under vmap
            continue
        gap = max(_gap(x, y) for x, y in zip(expected, found, strict=True))
        if gap <= tolerance:
            return candidate._replace(batched=_sends_back(seen, expected, tolerance)), None
    return template, Problem("(root)", problems.unlike_alone(names, name, "gradient", gap))


def _finite(seen: Seen, template: Template, examples: int) -> Seen:
    """Return the call with made-up rows for examples that have a nan, which have no gradients."""
    arguments = list(seen.call.leaves)
    generator = torch.Generator().manual_seed(7)
    changed = False
    for index, place in enumerate(template.arguments):
        leaf = arguments[index]
        if place is None or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        rows = place.rows(leaf.detach(), examples)
        drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
        lost = rows.isnan().flatten(1).any(dim=1)
        if bool(lost.any()):
            rows = torch.where(lost.view(-1, *(1,) * (rows.dim() - 1)), drawn, rows)
            arguments[index] = place.put_back(rows).requires_grad_()
            changed = True
    if not changed:
        return seen
    with torch.enable_grad():
        results = pytree.tree_leaves(seen.call.run(arguments))
    return replace(seen, call=replace(seen.call, leaves=arguments), results=results)


def _sends_back(seen: Seen, own: Sequence[Tensor], tolerance: float) -> bool:
    """Return whether vmap sends per-example gradients back to the parameters correctly.

    They go back through the functions that computed the call's arguments from the parameters.
    """
    for made, gradients in zip(seen.call.made.values(), own, strict=True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = sent_back(made.value, gradients, batched=True)
        except Exception:  # whatever the functions raise under vmap
            return False
        expected = sent_back(made.value, gradients, batched=False)
        if any(_gap(x, y) > tolerance for x, y in zip(expected, found, strict=True)):
            return False
    return True


def _upstream(seen: Seen, template: Template, examples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for x, place in zip(seen.results, template.outputs, strict=True):
        if place is not None:
            rows = place.rows(x.detach(), examples)
            drawn = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
            made.append(drawn.to(rows))
    return made


def _by_autograd(seen: Seen, template: Template, upstream: Sequence[Tensor]) -> list[Tensor]:
    graph = own_gradients(
        seen.call,
        template._replace(method="graph"),
        seen.results,
        upstream,
        len(upstream[0]),
    )
    return list(graph(slice(None)))


def _gap_of_results(seen: Seen, template: Template, examples: int) -> float:
    values = [seen.call.leaves[index] for index in seen.call.made]
    given = template.given(seen.call.leaves, examples)
    whole = [place.rows(x.detach(), examples) for x, place in template.placed(seen.results)]
    worst = 0.0
    for row in range(examples):
        try:
            with torch.no_grad():
                alone = seen.call.of_example(template, [x[row] for x in given], values)
        except Exception:  # whatever the function raises on one example
            return torch.inf
        worst = max(worst, *(_gap(x[row], y) for x, y in zip(whole, alone, strict=True)))
    return worst


def _gap(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return torch.inf
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    return float(distance(one.detach().reshape(1, -1), other.detach().reshape(1, -1)).max())
