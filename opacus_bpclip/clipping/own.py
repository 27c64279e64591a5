"""The exact bound where it pays to make each example's own gradient.

A few examples' gradients at a time are made, measured, scaled and added up, and are gone before the
next ones. What is measured is the very thing that is added up, whatever rounding has made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.clipping.ops import Factors
from opacus_bpclip.rules import FusedRule
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.cancellation import kept
from opacus_bpclip.rules.exact_norms import chunks, exact_chunk
from opacus_bpclip.rules.norms import row_norms


class Summed(NamedTuple):
    """What has become of a batch.

    Attributes:
        factors: as from `clip_factors`.
        part: ``[B]``, what part of its own gradient an example keeps, see `cancellation.kept`.
        gradient: the sum of the examples' gradients of the weight, each times factor and part.
    """

    factors: Factors
    part: Tensor
    gradient: Tensor


def sum_own_gradients(
    rule: FusedRule,
    g: Tensor,
    scaled: Tensor,
    x: Tensor,
    weight: Tensor,
    columns: Tensor,
    finite: Tensor | None,
    factors_of: Callable[..., Factors],
    limit: Tensor | float,
) -> Summed:
    """Clip and add up the examples' gradients of a layer's weight.

    Args:
        rule: the layer's.
        g: upstream gradient, batch first, of one example at least.
        scaled: the same, scaled by the factors of the input's columns.
        x: the input, not scaled.
        weight: the layer's.
        columns: norms from `MatrixRule.with_one`, of the scaled columns.
        finite: as for `clip_factors`.
        factors_of: `clip_factors` for this layer and batch.
        limit: as for `cancellation.kept`, of gradients as they are measured here.
    """
    least = rule.least_bound("exact", g.dtype, None)
    found: list[Factors] = []
    parts: list[Tensor] = []
    total: Tensor | None = None
    for rows in chunks(len(g), exact_chunk(rule.own_bytes(g, weight), g.device)):
        own = rule.own_gradients(scaled[rows], x[rows], weight)
        bound = rule.bound_of_own(own, g[rows], columns[rows])
        # Where positions cancel, rounding alone may be left of their sum.
        part = kept(bound, row_norms(g[rows]) * row_norms(columns[rows]), g.dtype, limit)
        factors = factors_of(
            bound,
            None if finite is None else finite[rows],
            size=partial(rule.size_of, "exact", g[rows], columns[rows]),
            least=least,
        )
        flat = zero_rows(own.flatten(1), factors.keep)
        summed = (factors.factor * part.to(factors.factor.dtype)).to(flat.dtype) @ flat
        total = summed if total is None else total.add_(summed)
        found.append(factors)
        parts.append(part)
    assert total is not None
    part = parts[0] if len(parts) == 1 else torch.cat(parts)
    return Summed(_joined(found), part, total.view(weight.shape).to(weight.dtype))


def _joined(found: list[Factors]) -> Factors:
    if len(found) == 1:
        return found[0]
    keep = None
    if any(part.keep is not None for part in found):
        keep = torch.cat(
            [
                torch.ones_like(part.factor, dtype=torch.bool) if part.keep is None else part.keep
                for part in found
            ]
        )
    return Factors(torch.cat([part.factor for part in found]), keep)
