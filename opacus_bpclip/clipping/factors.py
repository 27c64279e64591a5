"""Compute the factor that scales each example's gradient, from a bound on its norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opacus_bpclip.rules.base import where_needed, zero_rows
from opacus_bpclip.rules.precision import rounding_margin

# Relative to the threshold: how far around it the count of examples falls from 1 to 0.
COUNT_WIDTH = 0.1


class Measured(NamedTuple):
    """A bound on the norm of each example's gradient.

    Attributes:
        bound: ``[B]``, an upper bound on the norm.
        usable: ``[B]`` bool, whether the bound holds: the example is finite, and nothing has
            overflowed in the computation of the bound. ``None`` for all.
    """

    bound: Tensor
    usable: Tensor | None


class Factors(NamedTuple):
    """The factors of the examples' gradients.

    Attributes:
        factor: ``[B]``; 0 where ``keep`` is false.
        keep: ``[B]`` bool. Where it is false, the gradient may not be finite, so it must be
            replaced by zeros, not multiplied by 0. ``None`` if it is true for all.
    """

    factor: Tensor
    keep: Tensor | None


class Target(NamedTuple):
    """The norm that the examples' gradients are scaled to.

    Attributes:
        norms: ``[2]``, the limit, which is the largest norm of a contribution; and the threshold,
            the largest norm of a gradient that is not scaled down. Gradients within the threshold
            are multiplied by ``limit / threshold``.
        normalize: whether smaller gradients are scaled up, whatever the threshold is.
        stability: the constant added to the norm that a normalised gradient is divided by.
        tally: receives the number of examples within the threshold, see `centred_count`; ``None``
            if they are not counted.
        uses: the number of scopes with this target in one forward pass, at most.
    """

    norms: Tensor
    normalize: bool = False
    stability: float = 0.0
    tally: nn.Parameter | None = None
    uses: int = 1

    def at_hand(self) -> tuple[Any, Any]:
        """Return limit and threshold: Python numbers where possible, since tensors cost kernels."""
        if torch.compiler.is_compiling():
            return self.norms[0], self.norms[1]
        limit, threshold = self.norms.tolist()
        return limit, threshold

    def unscaled(self) -> Any:
        """Return the norm below which the factor hardly depends on the norm.

        With clipping, the factor is constant up to the threshold. With normalisation, it is nearly
        ``limit / stability`` for norms far below ``stability``.
        """
        return self.stability if self.normalize else self.at_hand()[1]


def measured(
    bound: Tensor,
    finite: Tensor | None,
    *,
    size: Callable[[], Tensor] | None = None,
    least: float = 0.0,
    examples: int = 1,
) -> Measured:
    """Find the examples whose bound can be trusted.

    Args:
        bound: ``[B]``, upper bounds on the norms of the gradients.
        finite: ``[B]`` bool, which examples' inputs are finite; ``None`` for all.
        size: returns ``[B]``, numbers that must be in range, too, for the bound to be right: see
            `Rule.size`. Called only if needed. ``None`` if the bound is its own size.
        least: a lower bound on the ratio ``bound / size``; 0 if none is known.
        examples: the number that a mean loss has divided the gradients by.
    """
    # Below this threshold no square overflows. Multiplied by `examples` it is the same number for
    # every batch size. nan compares as False.
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
    """Return the norm from which on a gradient divided by ``examples`` contributes zero."""
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
    """Return the factors that scale each example's gradient, times ``examples``, to the limit.

    Guarantee: ``factor * examples * bound <= limit``, with a margin for the rounding of gradients
    of ``dtype``. An example's factor depends on ``examples`` by rounding alone. The factor of a row
    that is not present is 0.

    Args:
        found: the bounds on the gradients' norms.
        target: the limit.
        dtype: the dtype of the gradients and of the factors.
        examples: the number that a mean loss has divided the gradients by.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
    """
    bound, usable = found
    divided = max(examples, 1)
    part = (1 - rounding_margin(dtype, bound.device)) / divided
    limit, threshold = target.at_hand()
    if target.normalize:
        factor = limit * part / (bound + target.stability / divided)
    else:
        factor = (threshold * part / bound).clamp(max=1)
        if torch.compiler.is_compiling() or limit != threshold:
            factor = factor * (limit / threshold)
    if present is not None:
        # Usable gradients are finite, so that a factor of 0 suffices and `keep` need not change.
        factor = zero_rows(factor, present.to(factor.device))
    return Factors(zero_rows(factor, usable).to(dtype), usable)


def centred_count(
    found: Measured, target: Target, *, examples: int = 1, present: Tensor | None = None
) -> Tensor:
    """Return the number of examples within the threshold minus half the number of all. ``[]``.

    Guarantee: an example changes the result by at most ``1 / (2 uses)``. It counts 1/2 well within
    the threshold, -1/2 well above, and 0 if it is not usable or not present. In between the count
    falls linearly: a jump would turn a rounding error, which depends on ``examples``, into a whole
    example.

    Args:
        found: the bounds on the gradients' norms.
        target: the threshold.
        examples: the number that a mean loss has divided the gradients by.
        present: ``[B]`` bool, which rows are not padding; ``None`` for all.
    """
    _, threshold = target.at_hand()
    ratio = found.bound.double() * max(examples, 1) / threshold
    counted = ((1 - ratio) / (2 * COUNT_WIDTH)).clamp(-0.5, 0.5)
    counted = zero_rows(counted, found.usable)
    if present is not None:
        counted = zero_rows(counted, present.to(counted.device))
    return counted.sum() / target.uses


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return the logical and of two masks, where ``None`` means all true."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def everywhere(flags: Iterable[Tensor | None]) -> Tensor | None:
    """Return the logical and of several masks, where ``None`` means all true."""
    known = [flag for flag in flags if flag is not None]
    if len(known) < 2:
        return known[0] if known else None
    return torch.stack(known).all(dim=0)


def joined(found: Sequence[Measured]) -> Measured:
    """Concatenate the measurements of several parts of a batch."""
    sizes = [each.bound.shape[0] for each in found]
    usable = joined_keep([each.usable for each in found], sizes)
    return Measured(torch.cat([each.bound for each in found]), usable)


def joined_keep(keeps: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Concatenate the masks of several parts of a batch, where ``None`` means all true."""
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
    """Append rows of ``fill`` to ``x`` until it has ``rows`` rows."""
    if x.shape[0] == rows:
        return x
    return torch.cat([x, x.new_full((rows - x.shape[0], *x.shape[1:]), fill)])


def _all_below(bound: Tensor, limit: float) -> bool:
    """Return whether every bound is below a limit; False where the check would cost a stall."""
    if torch.compiler.is_compiling() or bound.device.type != "cpu" or not len(bound):
        return False
    return bool(bound.max() < limit)
