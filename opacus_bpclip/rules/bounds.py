"""The three values of the option ``bound``, and the method of a rule that each of them calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opacus_bpclip.rules.base import Inputs, Rule
    from opacus_bpclip.rules.fused import FusedRule, Scaled


class Bound(ABC):
    """A way to bound the norm of an example's gradient.

    Attributes:
        needs_norms: whether the bound reads the norms of the input's columns.
        is_norm: whether the bound is the norm itself. Then the gradients of several uses are added
            before they are measured; the other bounds of several uses are added.
    """

    needs_norms: ClassVar[bool] = True
    is_norm: ClassVar[bool] = False

    @abstractmethod
    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return an upper bound on the norm of each example's gradient, ``[B]``.

        Args:
            rule: the layer's rule.
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            norms: the columns' norms from `Rule.prepare`, or ``None``.
            max_norm: the norm that the columns were clipped to; ``None`` if they were not.
        """

    @abstractmethod
    def of_scaled(
        self, rule: FusedRule, g: Tensor, scaled: Scaled, scratch: Tensor | None
    ) -> Tensor:
        """Return `of` for an input whose scaled form is never built as a whole.

        Args:
            rule: the layer's rule.
            g: gradient of the layer's output, batch first.
            scaled: the input, and the factors of its columns.
            scratch: memory of ``g``'s shape, overwritten; ``None`` allocates.
        """

    def size(self, rule: Rule, g: Tensor, norms: Tensor | None) -> Tensor:
        """Return, for each example, an upper bound on the numbers that get squared. ``[B]``.

        If its square overflows, the bound cannot be trusted and the example contributes zero.

        Args:
            rule: the layer's rule.
            g: gradient of the layer's output, batch first.
            norms: the columns' norms from `Rule.prepare`, or ``None``.
        """
        return rule.cheap_size(g, norms)

    def size_of_scaled(self, rule: FusedRule, g: Tensor, columns: Tensor | None) -> Tensor:
        """Return `size`, given the norms of the scaled columns.

        Args:
            rule: the layer's rule.
            g: gradient of the layer's output, batch first.
            columns: the norms that `Scaled.columns` holds.
        """
        return rule.cheap_size(g, columns)

    @abstractmethod
    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return a lower bound on the ratio of the bound to `size`; 0 where none is known.

        The weighted and the product bound are at least the shortest column's norm times the norm of
        the upstream gradient. The exact bound is at least its own margin for rounding. If the ratio
        is 1 or more, a bound in range implies a size in range.

        Args:
            rule: the layer's rule.
            dtype: the dtype of the upstream gradient.
            max_norm: the norm that the columns were clipped to; ``None`` if they were not.
        """


class Product(Bound):
    """The largest norm that a column may have, times a norm of the upstream gradient."""

    needs_norms = False

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the rule's product bound."""
        return rule.product(g, inputs, norms, max_norm)

    def of_scaled(
        self, rule: FusedRule, g: Tensor, scaled: Scaled, scratch: Tensor | None
    ) -> Tensor:
        """Return the product bound for the norm that the columns are clipped to."""
        return rule.product_bound(g, scaled.max_norm, scratch)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return the largest norm that a column may have."""
        return rule.largest_column(max_norm)


class Weighted(Bound):
    """Each position's upstream gradient weighted by its column's norm."""

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the rule's weighted bound."""
        return rule.weighted(g, inputs, norms)

    def of_scaled(
        self, rule: FusedRule, g: Tensor, scaled: Scaled, scratch: Tensor | None
    ) -> Tensor:
        """Return the weighted bound for the norms of the scaled columns."""
        assert scaled.columns is not None
        return rule.weighted_bound(g, scaled.columns, scratch)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return the smallest norm that a column may have."""
        return rule.shortest_column(dtype)


class Exact(Bound):
    """The norm of the example's gradient itself."""

    is_norm = True

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the rule's exact bound."""
        return rule.exact(g, inputs, norms)

    def of_scaled(
        self, rule: FusedRule, g: Tensor, scaled: Scaled, scratch: Tensor | None
    ) -> Tensor:
        """Scale the inputs of a few examples at a time, and measure them."""
        assert scaled.columns is not None
        return rule.exact_bound(rule.upstream(g), scaled.x, scaled.columns, scaled.factor)

    def size(self, rule: Rule, g: Tensor, norms: Tensor | None) -> Tensor:
        """Return a size that covers terms which cancel in the sum over positions."""
        return rule.size(g, norms)

    def size_of_scaled(self, rule: FusedRule, g: Tensor, columns: Tensor | None) -> Tensor:
        """Return a size that covers terms which cancel in the sum over positions."""
        assert columns is not None
        return rule.size_of(g, columns)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return the smallest ratio of the margin for rounding to the size."""
        return rule.least_exact(dtype)


_BOUNDS: dict[str, Bound] = {"product": Product(), "weighted": Weighted(), "exact": Exact()}


def bound_of(name: str) -> Bound:
    """Return the bound for a value of the option ``bound``.

    Args:
        name: ``"product"``, ``"weighted"`` or ``"exact"``.

    Example:
        >>> bound_of("exact").is_norm
        True
    """
    return _BOUNDS[name]
