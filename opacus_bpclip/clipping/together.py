"""Measure the sum of several uses of the same parameters in one forward pass.

The product and the weighted bound add the bounds of the uses, by the triangle inequality. The exact
bound measures the sum of the gradients itself. Proof: ``docs/guarantee.md``, "Uses that add up".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from opacus_bpclip.clipping.factors import Factors, Measured, both, measured, padded
from opacus_bpclip.clipping.fused_use import FusedUse, Measurement
from opacus_bpclip.clipping.use import OwnUse, Use
from opacus_bpclip.rules import Bound, LinearRule
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.exact_norms import chunks, exact_bound, exact_chunk
from opacus_bpclip.rules.norms import accumulation, row_norms, underflow
from opacus_bpclip.rules.precision import norm_dtype, rounding_margin

# Numbers in an example's gradient up to which it is made to be added up over uses. A large weight's
# (an embedding tied to the output head) would take more time than the rest of the step.
_OWN_MOST = 2**16

# Units in the last place to which the margin grows where such gradients are not added up behind a
# mean loss: the uses' sums over the batch then have rounding errors that do not cancel. Under the
# root it is a quarter of the uses' norms in float32. Measured on 2,000 equal examples by
# tests/test_cancelling_sums.py.
_APART = 2**19


def merged(uses: Sequence[Use]) -> Sequence[Use]:
    """Merge all uses of one linear layer into one use; return other uses unchanged."""
    fused = [use for use in uses if isinstance(use, FusedUse)]
    linear = [use for use in fused if isinstance(use.layer.rule, LinearRule)]
    if len(linear) < len(uses) or len({use.layer.name for use in uses}) > 1:
        return uses
    return [_positions_of_all(linear)]


def _positions_of_all(uses: Sequence[FusedUse]) -> FusedUse:
    """Return one use of a linear layer with the positions of all uses.

    A use with fewer rows is padded with zeros: the other sequences have ended there.
    """
    first, rows = uses[0], max(use.g.shape[0] for use in uses)

    def both_of(parts: list[Tensor | None]) -> Tensor | None:
        present = [padded(part, rows) for part in parts if part is not None]
        return torch.cat(present, dim=2) if present else None

    g, x = (
        torch.cat(
            [padded(t.reshape(t.shape[0], t.shape[1:-1].numel(), t.shape[-1]), rows) for t in part],
            dim=1,
        )
        for part in ([use.g for use in uses], [use.x for use in uses])
    )
    finite = None
    for use in uses:
        if use.finite is not None:
            finite = both(finite, padded(use.finite, rows, fill=True))
    measurement = Measurement(
        both_of([use.factor for use in uses]), both_of([use.columns for use in uses]), finite
    )
    return FusedUse(
        first.layer,
        first.rule,
        first.bound,
        first.max_input_norm,
        first.target,
        first.examples,
        g,
        x,
        first.weight,
        measurement,
        wants_input=False,
    )


def measure_together(uses: Sequence[Use], bound: Bound, *, mean: bool) -> Measured:
    """Bound the norm of each example's gradient, summed over uses of the same parameters.

    Args:
        uses: uses of one layer or of layers that share parameters, from `merged`.
        bound: the bound on an example's gradient.
        mean: whether a mean loss has divided the gradients, and rounded them by the batch's size.
    """
    each = [use.measure() for use in uses]
    if len(each) == 1:
        return each[0]
    usable = reduce(both, (found.usable for found in each))
    bounds = [found.bound for found in each]
    if _is_norm(uses, bound):
        joint = _summed(uses, bounds, _APART if mean and not adds_up(uses, bound) else 0)
    else:
        joint = reduce(torch.add, bounds)
    total = measured(joint, None, examples=uses[0].examples)
    return Measured(joint, both(usable, total.usable))


def _is_norm(uses: Sequence[Use], bound: Bound) -> bool:
    """Return whether uses are measured by the norm of their sum, not by the sum of their bounds."""
    own = all(isinstance(use, OwnUse) and use.layer is uses[0].layer for use in uses)
    return bound.is_norm or own


def adds_up(uses: Sequence[Use], bound: Bound) -> bool:
    """Return whether to make the sum of several uses by `added`."""
    sizes = {p: p.numel() for use in uses for p in use.layer.parameters}
    return len(uses) > 1 and _is_norm(uses, bound) and sum(sizes.values()) <= _OWN_MOST


def added(uses: Sequence[Use], factors: Factors) -> dict[nn.Parameter, Tensor]:
    """Return the sums over the batch, with the uses' gradients of each example added up first.

    Where the uses cancel, their sums over the batch are large and cancel, too. The rounding errors
    of these sums would be as large as contributions.

    Args:
        uses: uses of the same parameters, for which `adds_up` is true.
        factors: the examples' factors.
    """
    sizes = {p: p.numel() for use in uses for p in use.layer.parameters}
    by, keep = factors
    total: dict[nn.Parameter, Tensor] = {}
    needed = sum(sizes.values()) * 2 * by.dtype.itemsize
    for rows in chunks(by.shape[0], exact_chunk(needed, by.device)):
        few = None if keep is None else keep[rows]
        for parameter, own in _own_of_all(uses, rows).items():
            flat = zero_rows(own.unsqueeze(1).flatten(1), few)
            part = (by[rows].to(flat.dtype) @ flat).view(parameter.shape) * uses[0].examples
            total[parameter] = total[parameter] + part if parameter in total else part
    return total


def _own_of_all(uses: Sequence[Use], rows: slice) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of some examples, added up over the uses."""
    sums: dict[nn.Parameter, Tensor] = {}
    for use in uses:
        for name, gradient in use.own(rows).items():
            parameter = use.layer.named_parameters[name]
            sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
    return sums


def _summed(uses: Sequence[Use], bounds: Sequence[Tensor], least: int) -> Tensor:
    """Return the norm of the sum of the uses' gradients, a few examples at a time. ``[B]``.

    Args:
        uses: uses of the same parameters.
        bounds: ``[B]`` each, the bounds on the norms of each use's gradients.
        least: the least margin for what the uses leave where they cancel, in units in the last
            place.
    """
    layers = {use.layer.name: use.layer for use in uses}
    sizes = {p: p.numel() for layer in layers.values() for p in layer.parameters}
    dtype = norm_dtype(bounds[0].dtype)
    needed = sum(sizes.values()) * 2 * dtype.itemsize
    parts = []
    for rows in chunks(bounds[0].shape[0], exact_chunk(needed, bounds[0].device)):
        parts.append(_norm_of_sum(uses, rows))
    # The uses' gradients may cancel, but their rounding errors do not, and with a mean loss these
    # depend on the batch's size. The margin stands under the root, as for Gram matrices, so that
    # they are not scaled up to the limit.
    margin = max(rounding_margin(bounds[0].dtype, bounds[0].device), least * torch.finfo(dtype).eps)
    return torch.hypot(torch.cat(parts), margin**0.5 * reduce(torch.add, bounds))


def _norm_of_sum(uses: Sequence[Use], rows: slice) -> Tensor:
    matrices = [use.matrices(rows) for use in uses]
    sums: dict[Tensor, Tensor] = {}
    products: dict[Tensor, list[tuple[Tensor, Tensor]]] = {}
    shared = _always_products(uses, matrices)
    for use, own in zip(uses, matrices, strict=True):
        for name, parameter in use.layer.named_parameters.items():
            if parameter in shared:
                products.setdefault(parameter, []).append(own[name])
        if any(p not in shared for p in use.layer.parameters):
            for name, gradient in use.own(rows).items():
                parameter = use.layer.named_parameters[name]
                if parameter not in shared:
                    earlier = sums.get(parameter)
                    sums[parameter] = gradient if earlier is None else earlier + gradient
    norms = [row_norms(gradient) for gradient in sums.values()]
    norms += [_norm_of_products(pairs) for pairs in products.values()]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].dtype) for n in norms]), dim=0)


def _always_products(uses: Sequence[Use], matrices: Sequence[object]) -> set[Tensor]:
    """Return the parameters whose gradient is a product in every use."""
    shared: set[Tensor] = set()
    refused: set[Tensor] = set()
    for use, own in zip(uses, matrices, strict=True):
        for name, parameter in use.layer.named_parameters.items():
            (shared if name in own else refused).add(parameter)  # type: ignore[operator]
    return shared - refused


def _norm_of_products(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the norm of a sum of products, computed in the cheapest way. ``[B]``."""
    left = torch.cat([one for one, _ in pairs], dim=3)
    right = torch.cat([other for _, other in pairs], dim=3)
    dtype = norm_dtype(left.dtype)
    norms = torch.linalg.vector_norm(right, dim=2, dtype=dtype) + underflow(right.shape[2], dtype)
    slack = rounding_margin(left.dtype, left.device)
    positions = [one.shape[3] for one, _ in pairs]
    bound = exact_bound(left, right, norms, weight=True, bias=False, slack=slack, uses=positions)
    return bound * accumulation(left.shape[3], dtype)
