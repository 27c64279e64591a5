"""The three bounds: which method of a rule measures a gradient, and what may stand in for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opacus_bpclip.rules.base import Inputs, Rule
    from opacus_bpclip.rules.fused import FusedRule, Scaled


class Bound(ABC):
    """How the norm of an example's gradient is bounded.

    Attributes:
        needs_norms: whether the norms of the input's columns enter it.
        is_norm: whether it is the norm itself. Then gradients may be made, added up and measured;
            of several uses any other bound adds up.
    """

    needs_norms: ClassVar[bool] = True
    is_norm: ClassVar[bool] = False

    @abstractmethod
    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return an upper bound on the norm of each example's gradient, ``[B]``.

        Args:
            rule: the layer's.
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            norms: their norms, if the rule has measured any.
            max_norm: what the inputs' norms were clipped to.
        """

    @abstractmethod
    def of_scaled(self, rule: FusedRule, g: Tensor, scaled: Scaled, room: Tensor | None) -> Tensor:
        """Return `of` for an input that is scaled, and never made as a whole.

        Args:
            rule: the layer's.
            g: as for `of`.
            scaled: the input.
            room: as ``g``, overwritten; saves fresh memory.
        """

    def size(self, rule: Rule, g: Tensor, norms: Tensor | None) -> Tensor:
        """Return what must be in the range of squares for the bound to be right, ``[B]``.

        Args:
            rule: as for `of`.
            g: as for `of`.
            norms: as for `of`.
        """
        return rule.cheap_size(g, norms)

    def size_of_scaled(self, rule: FusedRule, g: Tensor, columns: Tensor | None) -> Tensor:
        """Return `size` for columns of these norms.

        Args:
            rule: as for `of_scaled`.
            g: as for `of`.
            columns: as in `Scaled`.
        """
        return rule.cheap_size(g, columns)

    @abstractmethod
    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return what part of the size the bound is at least; 0 where that is not known.

        A bound of some positions' sum is at least the shortest column's norm times the upstream
        gradient's; an exact one is at least what it adds for rounding. With 1 or more, the bound
        alone tells whether it is in range.

        Args:
            rule: as for `of_scaled`.
            dtype: of the upstream gradient.
            max_norm: as for `of`.
        """


class Product(Bound):
    """The largest norm that a column may have, times the upstream gradient's."""

    needs_norms = False

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Ask for the product bound."""
        return rule.product(g, inputs, norms, max_norm)

    def of_scaled(self, rule: FusedRule, g: Tensor, scaled: Scaled, room: Tensor | None) -> Tensor:
        """Take what columns are scaled to."""
        return rule.product_bound(g, scaled.max_norm, room)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return the largest column's norm."""
        return rule.largest_column(max_norm)


class Weighted(Bound):
    """Each position's upstream gradient weighted by its column's norm."""

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Ask for the weighted bound."""
        return rule.weighted(g, inputs, norms)

    def of_scaled(self, rule: FusedRule, g: Tensor, scaled: Scaled, room: Tensor | None) -> Tensor:
        """Take the columns' norms."""
        assert scaled.columns is not None
        return rule.weighted_bound(g, scaled.columns, room)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return the shortest column's norm."""
        return rule.shortest_column(dtype)


class Exact(Bound):
    """The norm itself."""

    is_norm = True

    def of(
        self, rule: Rule, g: Tensor, inputs: Inputs, norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Ask for the norm."""
        return rule.exact(g, inputs, norms)

    def of_scaled(self, rule: FusedRule, g: Tensor, scaled: Scaled, room: Tensor | None) -> Tensor:
        """Scale the input for a few examples at a time."""
        assert scaled.columns is not None
        return rule.exact_bound(rule.upstream(g), scaled.x, scaled.columns, scaled.factor)

    def size(self, rule: Rule, g: Tensor, norms: Tensor | None) -> Tensor:
        """Return that of what may cancel, too."""
        return rule.size(g, norms)

    def size_of_scaled(self, rule: FusedRule, g: Tensor, columns: Tensor | None) -> Tensor:
        """Return that of what may cancel, too."""
        assert columns is not None
        return rule.size_of(g, columns)

    def least(self, rule: FusedRule, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return what rounding adds at least."""
        return rule.least_exact(dtype)


_BOUNDS: dict[str, Bound] = {"product": Product(), "weighted": Weighted(), "exact": Exact()}


def bound_of(name: str) -> Bound:
    """Return the bound that the option of this name stands for.

    Args:
        name: ``"product"``, ``"weighted"`` or ``"exact"``.

    Example:
        >>> bound_of("exact").is_norm
        True
    """
    return _BOUNDS[name]
