"""From a bound on each example's gradient to the factor that it is multiplied by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.rules.base import where_needed, zero_rows
from opacus_bpclip.rules.precision import rounding_margin


class Measured(NamedTuple):
    """How large each example's gradient is.

    Attributes:
        bound: ``[B]``, an upper bound on its norm.
        usable: ``[B]`` bool, whether the bound holds: the example is finite, and nothing overflows
            on the way to the bound. ``None`` for all.
    """

    bound: Tensor
    usable: Tensor | None


class Factors(NamedTuple):
    """What the examples' gradients are to be multiplied by.

    Attributes:
        factor: ``[B]``; 0 where nothing is kept.
        keep: ``[B]`` bool; where false, the gradient may not be finite and is to be replaced by
            zeros. ``None`` where it is nowhere false.
    """

    factor: Tensor
    keep: Tensor | None


class Target(NamedTuple):
    """What the examples' gradients are scaled to.

    Attributes:
        limit: the largest norm of a contribution, a scalar tensor.
        normalize: whether to scale up, too.
        stability: added to the norm that a normalised gradient is divided by.
    """

    limit: Tensor
    normalize: bool = False
    stability: float = 0.0

    def unscaled(self) -> Tensor | float:
        """Return up to which norm a gradient is multiplied by one number, whatever its norm."""
        if self.normalize:
            return self.stability
        return self.limit if torch.compiler.is_compiling() else self.limit.item()


def measured(
    bound: Tensor,
    finite: Tensor | None,
    *,
    size: Callable[[], Tensor] | None = None,
    least: float = 0.0,
    examples: int = 1,
) -> Measured:
    """Find the examples whose bound is to be relied on.

    Args:
        bound: ``[B]``, on the norms of the gradients at hand.
        finite: ``[B]`` bool, which examples' inputs are finite; ``None`` for all.
        size: returns ``[B]``, a number that must be in range, too, for the bound to be right: see
            `Rule.size`. Called only if needed. ``None`` for the bound itself.
        least: what part of ``size`` the bound is at least.
        examples: by what a mean loss has divided the gradients at hand.
    """
    # No square of what is below overflows, so that this threshold is the first to be met, and it is
    # the same for every `examples`. Comparing with nan gives False.
    largest = largest_norm(bound.dtype, examples)
    if size is None:
        least = 1.0
    if finite is None and least > 0 and _all_below(bound, largest * min(least, 1.0)):
        return Measured(bound, None)
    in_range = bound
    if size is not None and least < 1:
        in_range = torch.maximum(bound, size())  # nan if one of them is
        if finite is None and _all_below(in_range, largest):
            return Measured(bound, None)
    usable = in_range < largest
    return Measured(bound, where_needed(usable if finite is None else usable & finite))


def largest_norm(dtype: torch.dtype, examples: int) -> float:
    """Return the largest norm that is taken for a number, of gradients divided by ``examples``."""
    largest: float = torch.finfo(dtype).max ** 0.5 / (16 * max(examples, 1))
    return largest


def clip_factors(
    found: Measured,
    target: Target,
    dtype: torch.dtype,
    *,
    examples: int = 1,
    present: Tensor | None = None,
) -> Factors:
    """Return what brings each example's gradient, times ``examples``, within the limit.

    Guarantee: ``factor * examples * bound <= limit``, with room for the rounding of gradients of
    ``dtype``; an example's factor depends on ``examples`` by rounding alone. The factor of a row
    that is not present is 0.

    Args:
        found: how large they are.
        target: what they are scaled to.
        dtype: of the gradients, and of the factors.
        examples: by what a mean loss has divided the gradients at hand.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
    """
    bound, usable = found
    divided = max(examples, 1)
    part = (1 - rounding_margin(dtype, bound.device)) / divided
    # As a number where that is possible: a scalar tensor costs a kernel for each operation.
    limit = target.limit if torch.compiler.is_compiling() else target.limit.item()
    if target.normalize:
        factor = limit * part / (bound + target.stability / divided)
    else:
        factor = (limit * part / bound).clamp(max=1)
    if present is not None:
        # What is usable is finite, so that zero times it is zero: no gradient is to be rewritten.
        factor = zero_rows(factor, present.to(factor.device))
    return Factors(zero_rows(factor, usable).to(dtype), usable)


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return where both are true, ``None`` for everywhere."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def everywhere(flags: Iterable[Tensor | None]) -> Tensor | None:
    """Return where all are true, ``None`` for everywhere."""
    known = [flag for flag in flags if flag is not None]
    if len(known) < 2:
        return known[0] if known else None
    return torch.stack(known).all(dim=0)


def joined(found: Sequence[Measured]) -> Measured:
    """Return what was measured of several parts of a batch as one."""
    sizes = [each.bound.shape[0] for each in found]
    usable = joined_keep([each.usable for each in found], sizes)
    return Measured(torch.cat([each.bound for each in found]), usable)


def joined_keep(keeps: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Return the flags of several parts of a batch as one; ``None`` if all are true."""
    known = [keep for keep in keeps if keep is not None]
    if not known:
        return None
    return torch.cat(
        [
            known[0].new_ones(size) if keep is None else keep
            for keep, size in zip(keeps, sizes, strict=True)
        ]
    )


def padded(x: Tensor, rows: int, *, fill: bool = False) -> Tensor:
    """Add rows of zeros, or of ``fill``, up to a number."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), fill)])


def _all_below(bound: Tensor, limit: float) -> bool:
    """Return whether it costs nothing to know that every bound is below a limit, and it is."""
    if torch.compiler.is_compiling() or bound.device.type != "cpu" or not len(bound):
        return False
    return bool(bound.max() < limit)
