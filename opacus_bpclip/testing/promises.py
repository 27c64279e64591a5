"""The promises of a rule, each with a check that searches for a violation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from opacus_bpclip.testing.case import LIMIT, ROUNDING, Case, require
from opacus_bpclip.testing.hostile import hostile, shaped
from opacus_bpclip.testing.layer import ClippedLayer, Inputs, MakeInputs, each

_SPIKES = 50


def check_sums(case: Case, inputs: MakeInputs) -> None:
    """Check bound and independence on a hostile batch, input clipping on and off."""
    for max_input_norm in (3.0, None):
        if max_input_norm is None and case.bound == "product":
            continue
        case = replace(case, max_input_norm=max_input_norm)
        layer = ClippedLayer(case)
        count = 5
        arguments, upstream = hostile(layer, inputs, count)
        tolerance = ROUNDING[case.dtype] * LIMIT * (count + 1)
        together = layer.run(arguments, upstream)
        # A fresh layer for each example: a rule must not remember earlier ones.
        runs = [
            ClippedLayer(case).run(layer.rows(arguments, [i]), layer.example(upstream, [i]))
            for i in range(count)
        ]
        alone = [run.contribution for run in runs]
        for i, own in enumerate(alone):
            require(bool(own.isfinite().all()), case, "bound", f"example {i}: not finite")
            norm = float(own.norm())
            require(norm <= LIMIT + tolerance, case, "bound", f"{norm} > {LIMIT}")
        apart = float((together.contribution - torch.stack(alone).sum(dim=0)).norm())
        require(
            apart <= tolerance,
            case,
            "independence",
            f"the batch's gradient differs from the sum of its examples' gradients by {apart}",
        )
        for i, run in enumerate(runs):
            require(
                all(map(_agree, layer.rows(together.visible, [i]), run.visible)),
                case,
                "independence",
                f"the output or the input's gradient of example {i} depends on other examples",
            )


def _agree(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two rows are equal up to rounding; a mix of examples differs by far more."""
    if one is None or other is None:
        return one is other
    size = float(other.nan_to_num(posinf=0, neginf=0).abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def check_spikes(case: Case, inputs: MakeInputs) -> None:
    """Check the bound on inputs and upstream gradients with one entry, where it is often tight."""
    layer = ClippedLayer(case)
    (x, *others), upstream = layer.make(inputs, 1), layer.upstream(layer.make(inputs, 1))
    assert x is not None
    for _ in range(_SPIKES):
        one = shaped(x, "spike") * 1e4 if x.is_floating_point() else x
        own = layer.contribution((one, *others), shaped(upstream, "spike") * 1e4)
        norm = float(own.norm())
        require(norm <= LIMIT * (1 + 1e-9), case, "bound", f"{norm} > {LIMIT}")


def check_direction(case: Case, inputs: MakeInputs) -> None:
    """Check that a contribution is the example's gradient times one factor."""
    if case.bound == "product" or case.dtype != torch.float64:
        return
    layer = ClippedLayer(replace(case, max_input_norm=None))
    arguments = layer.make(inputs, 3)
    upstream = layer.upstream(arguments)
    for i in range(3):
        one, g = layer.rows(arguments, [i]), layer.example(upstream, [i])
        own, clipped = layer.gradient(one, g), layer.contribution(one, g)
        if not own.any():
            continue
        factor = float(own @ clipped / own.square().sum())
        off = float((clipped - factor * own).norm())
        require(
            off <= 1e-6 * LIMIT, case, "direction", f"off the direction of the gradient by {off}"
        )
        require(factor > 0, case, "direction", f"its factor is {factor}")
        if not case.normalize:
            require(factor <= 1 + 1e-9, case, "direction", f"its factor is {factor} > 1")


def check_attained(
    case: Case, inputs: MakeInputs, worst_case: tuple[Tensor | Inputs, Tensor] | None
) -> None:
    """Check that some example reaches the limit."""
    layer = ClippedLayer(case)
    best = 0.0
    for arguments, upstream in _candidates(layer, inputs, worst_case):
        best = max(best, float(layer.contribution(arguments, upstream).norm()))
        if best >= 0.999 * LIMIT:
            return
    require(False, case, "attainment", f"examples reach at most {best / LIMIT:.4f} of the limit")


def _candidates(
    layer: ClippedLayer, inputs: MakeInputs, worst_case: tuple[Tensor | Inputs, Tensor] | None
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield examples that may reach the limit: one input entry, and one upstream entry."""
    if worst_case is not None:
        arguments, upstream = worst_case
        yield layer.make(lambda _: arguments, 1), upstream.to(torch.float64)
        return
    template = layer.make(inputs, 1)
    first = template[0]
    assert first is not None
    spikes = [template]
    if first.is_floating_point():
        spikes = []
        for index in range(min(first.numel(), 64)):
            x = torch.zeros_like(first)
            x.view(-1)[index] = 1e4
            spikes.append((x, *template[1:]))
    for arguments in spikes:
        shape = layer.upstream(arguments)
        for index in range(min(shape.numel(), 64)):
            upstream = torch.zeros_like(shape)
            upstream.view(-1)[index] = 1e4
            yield arguments, upstream


def check_not_finite(case: Case, inputs: MakeInputs) -> None:
    """Check that an example with inf or nan contributes zero, and does not affect the others."""
    layer = ClippedLayer(case)
    arguments = layer.make(inputs, 3)
    upstream = layer.upstream(arguments)
    others = layer.contribution(layer.rows(arguments, [0, 1]), layer.example(upstream, [0, 1]))
    values = (float("nan"), float("inf"), -float("inf"))
    for value, where, _ in itertools.product(values, range(len(arguments) + 1), range(2)):
        *changed, g = spoiled = each((*arguments, upstream), torch.clone)
        target = spoiled[where]
        if target is None or not target.is_floating_point():
            continue
        row = target.select(layer.axis, 2)
        place = int(torch.randint(row.numel(), ()))
        row[tuple(int(k) for k in torch.unravel_index(torch.tensor(place), row.shape))] = value
        assert g is not None
        moved = float((layer.contribution(tuple(changed), g) - others).norm())
        # A comparison that is False for nan.
        zero = moved <= 1e-12 * LIMIT if case.dtype == torch.float64 else moved <= 1e-6 * LIMIT
        require(zero, case, "not finite", f"an example with {value} moved the sum by {moved}")


def check_empty(case: Case, inputs: MakeInputs) -> None:
    """Check that the gradient of an empty batch is zero."""
    layer = ClippedLayer(case)
    arguments = layer.rows(layer.make(inputs, 1), [])
    try:
        upstream = layer.upstream(arguments)
    except (RuntimeError, ValueError, IndexError):
        return  # the layer itself cannot run on an empty batch
    gradient = layer.contribution(arguments, upstream)
    require(not bool(gradient.any()), case, "empty batch", "the gradient is not zero")
