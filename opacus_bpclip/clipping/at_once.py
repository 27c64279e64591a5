"""Clip a linear layer or convolution that has a budget of its own, as soon as it is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opacus_bpclip.clipping.factors import Factors, joined_keep
from opacus_bpclip.clipping.use import Clipped, FactorsOf
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.exact_norms import chunks, exact_chunk
from opacus_bpclip.rules.precision import wide

if TYPE_CHECKING:
    from opacus_bpclip.clipping.fused_use import FusedUse


def clip_at_once(use: FusedUse, factors_of: FactorsOf) -> Clipped:
    """Measure, scale and sum the gradients of one use, with few passes over memory.

    Args:
        use: the use.
        factors_of: returns the factors for the measured bounds.
    """
    if not torch.compiler.is_compiling():
        use._scratch = torch.empty_like(use.g, dtype=use.dtype)
    if use.rule.sums_own(use.bound, use.g):
        return _clip_own(use, factors_of)
    factors = factors_of(use.measure_by_bound())
    g = zero_rows(wide(use.g), factors.keep)
    sums = {}
    # Before the products, which evict the gradient from the cache.
    if use.rule.bias:
        sums["bias"] = use.rule.bias_gradient(g, factors.factor) * use.examples
    wanted = (use.wants_input, use.rule.weight)
    dx, dw = _products(use, g, factors.factor, wanted)
    if dw is not None:
        sums["weight"] = dw
    return Clipped(sums, (dx,))


def _products(
    use: FusedUse, g: Tensor, by: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of input and weight from one scaled upstream gradient.

    If the model computes in low precision, so is the gradient of the input. The gradient of the
    weight, a sum over the batch, is not.
    """
    if not any(wanted):
        return None, None
    if g.dtype == use.g.dtype:
        return use._products(g, by, wanted)
    dx, dw = None, None
    if wanted[0]:
        dx, _ = use._products(g.to(use.g.dtype), by, (True, False))
    if wanted[1]:
        _, dw = use._products(g, by, (False, True))
    return dx, dw


def _clip_own(use: FusedUse, factors_of: FactorsOf) -> Clipped:
    """Compute the per-example gradients of a few examples at a time; measure, scale and add them.

    The gradients that are measured are the ones that are summed, rounding errors included.
    """
    found: list[Factors] = []
    cancellations: list[Tensor] = []
    total: Tensor | None = None
    bytes_of_own = use.rule.own_bytes(use.g, use.weight)
    for rows in chunks(use.g.shape[0], exact_chunk(bytes_of_own, use.g.device)):
        own, each, cancellation = use._own_of(rows)
        factors = factors_of(each, rows)
        flat = zero_rows(own.flatten(1), factors.keep)
        by = (factors.factor * cancellation.to(factors.factor.dtype)).to(flat.dtype)
        total = by @ flat if total is None else total.add_(by @ flat)
        found.append(factors)
        cancellations.append(cancellation)
    assert total is not None
    keep = joined_keep([each.keep for each in found], [each.factor.shape[0] for each in found])
    by = torch.cat([each.factor for each in found])
    sums = {"weight": total.view(use.weight.shape) * use.examples}
    if use.rule.bias:
        cancellation = torch.cat(cancellations).to(by.dtype)
        g = zero_rows(wide(use.g), keep)
        sums["bias"] = use.rule.bias_gradient(g, by * cancellation) * use.examples
    return Clipped(sums, use.input_gradients(Factors(by, keep)))
