"""A linear layer or convolution clipped by itself: measured, scaled and added up at once."""

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
    """Clip a use with as few passes over the gradients as there can be.

    Args:
        use: the use.
        factors_of: returns the factors for what was measured.
    """
    if not torch.compiler.is_compiling():
        use._room = torch.empty_like(use.g, dtype=use.dtype)
    if use.rule.sums_own(use.bound, use.g):
        return _clip_own(use, factors_of)
    factors = factors_of(use.measure_by_bound())
    g = zero_rows(wide(use.g), factors.keep)
    sums = {}
    # Before the products, which drive the gradient out of the processor's cache.
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
    """Return the gradients of input and weight by one scaled upstream gradient.

    In low precision the input's is made in that, as the model makes it, the weight's is not.
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
    """Make, measure, scale and add up a few examples' own gradients at a time.

    What is measured is the very thing that is added up, whatever rounding has made of it.
    """
    found: list[Factors] = []
    parts: list[Tensor] = []
    total: Tensor | None = None
    bytes_of_own = use.rule.own_bytes(use.g, use.weight)
    for rows in chunks(use.g.shape[0], exact_chunk(bytes_of_own, use.g.device)):
        own, each, part = use._own_of(rows)
        factors = factors_of(each, rows)
        flat = zero_rows(own.flatten(1), factors.keep)
        by = (factors.factor * part.to(factors.factor.dtype)).to(flat.dtype)
        total = by @ flat if total is None else total.add_(by @ flat)
        found.append(factors)
        parts.append(part)
    assert total is not None
    keep = joined_keep([each.keep for each in found], [each.factor.shape[0] for each in found])
    by = torch.cat([each.factor for each in found])
    sums = {"weight": total.view(use.weight.shape) * use.examples}
    if use.rule.bias:
        part = torch.cat(parts).to(by.dtype)
        g = zero_rows(wide(use.g), keep)
        sums["bias"] = use.rule.bias_gradient(g, by * part) * use.examples
    return Clipped(sums, use.input_gradients(Factors(by, keep)))
