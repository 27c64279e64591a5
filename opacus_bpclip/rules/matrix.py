"""Base class of the rules for layers whose gradient is one product, ``dW = sum_p g_p u_p^T``.

The layer may have a bias. Shapes: ``B`` examples, ``R`` groups, ``C`` output channels and ``D``
inputs per group, ``P`` positions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from opacus_bpclip.rules import exact_norms, norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule


class Measured(NamedTuple):
    """The norms of an input.

    Attributes:
        norms: ``[B, R, P]``, the norms of the columns.
        total: ``[B]``, a number that is finite if every number of the example and its square are.
    """

    norms: Tensor
    total: Tensor


@dataclass(frozen=True)
class MatrixRule(Rule):
    """Base class; a subclass says what the columns of its layer's input are."""

    clips_input: ClassVar[bool] = True

    @abstractmethod
    def measure(self, x: Tensor) -> Measured:
        """Return the norms of the columns of the input ``x``, ``[B, ...]``."""

    @abstractmethod
    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Return factors, at most 1, that scale every column to a norm of at most ``max_norm``.

        Args:
            norms: the columns' norms, ``[B, R, P]``.
            max_norm: the largest norm of a column.
            x: the input, ``[B, ...]``, for its shape.

        Returns:
            ``[B, R, P]``, with axes of size 1 where several columns share a factor.
        """

    @abstractmethod
    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the factors from `clip_factor` so that they broadcast over the input."""

    @abstractmethod
    def upstream(self, g: Tensor) -> Tensor:
        """View the gradient of the layer's output as ``[B, R, C, P]``."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """Return the input's columns, ``[B, R, D, P]``."""

    @abstractmethod
    def column_size(self) -> int:
        """Return ``D``, the number of inputs per group."""

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Clip every column to ``max_norm``."""
        (x,) = inputs
        assert x is not None
        column_norms, total = self.measure(x)
        finite = total.isfinite()
        if max_norm is None:
            return Prepared(inputs, column_norms, finite)
        factor = self.clip_factor(column_norms, max_norm, x)
        scale = self.spread(factor.to(x.dtype), x)
        return Prepared((x * scale,), column_norms * factor, finite, (scale,))

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return `product_bound`. Proof: ``docs/guarantee.md``."""
        return self.product_bound(g, max_norm)

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return `weighted_bound`. Proof: ``docs/guarantee.md``."""
        assert input_norms is not None
        return self.weighted_bound(g, self.with_one(input_norms))

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return `exact_bound`. Proof: ``docs/guarantee.md``."""
        (x,) = inputs
        assert x is not None
        assert input_norms is not None
        return self.exact_bound(self.upstream(g), x, self.with_one(input_norms))

    def with_one(self, input_norms: Tensor) -> Tensor:
        """Return the columns' norms with the bias's constant 1, given those without it."""
        return norms.column_norms(input_norms, weight=self.weight, bias=self.bias)

    def largest_column(self, max_norm: float | None) -> float:
        """Return the largest norm of a clipped column, the bias's constant 1 included."""
        assert max_norm is not None
        return norms.max_column_norm(max_norm, weight=self.weight, bias=self.bias)

    def product_bound(
        self, g: Tensor, max_norm: float | None, scratch: Tensor | None = None
    ) -> Tensor:
        """Return the product bound. ``[B]``.

        Args:
            g: gradient of the layer's output, batch first.
            max_norm: the norm that the columns were clipped to.
            scratch: memory of ``g``'s shape, overwritten; ``None`` allocates.
        """
        upstream, scratch = self.upstream(g), scratch if scratch is None else self.upstream(scratch)
        bound = norms.product_bound(upstream, self.largest_column(max_norm), scratch)
        return bound * norms.accumulation(upstream.shape[3], g.dtype)

    def weighted_bound(self, g: Tensor, columns: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Return the weighted bound. ``[B]``.

        Args:
            g: gradient of the layer's output, batch first.
            columns: the columns' norms, from `with_one`.
            scratch: memory of ``g``'s shape, overwritten; ``None`` allocates.
        """
        upstream, scratch = self.upstream(g), scratch if scratch is None else self.upstream(scratch)
        bound = norms.weighted_bound(upstream, columns, scratch)
        return bound * norms.accumulation(upstream.shape[3], g.dtype)

    def exact_bound(
        self, upstream: Tensor, x: Tensor, columns: Tensor, factor: Tensor | None = None
    ) -> Tensor:
        """Return the exact bound, computed for a few examples at a time. ``[B]``.

        Args:
            upstream: the upstream gradient, ``[B, R, C, P]``.
            x: the input, ``[B, ...]``.
            columns: the norms of the scaled columns, from `with_one`.
            factor: the factors by which ``x`` is still to be scaled, from `clip_factor`; ``None``
                for 1.
        """
        batch, groups, channels, positions = upstream.shape
        dtype = columns.dtype
        needed = exact_norms.exact_bytes(positions, groups, channels, self.column_size(), dtype)
        chunk = exact_norms.exact_chunk(needed, x.device)

        def of(rows: slice) -> Tensor:
            part = x[rows]
            if factor is not None:
                part = part * self.spread(factor[rows].to(part.dtype), part)
            return self.exact_of_columns(upstream[rows], self.columns(part), columns[rows])

        return exact_norms.in_chunks(batch, chunk, of) * norms.accumulation(positions, dtype)

    def exact_of_columns(self, upstream: Tensor, u: Tensor, norms: Tensor) -> Tensor:
        """Return the exact bound without what `accumulation` covers. ``[B]``.

        Args:
            upstream: the upstream gradient, ``[B, R, C, P]``.
            u: the scaled columns, ``[B, R, D, P]``.
            norms: the norms of the scaled columns, from `with_one`.
        """
        slack = precision.rounding_margin(upstream.dtype, upstream.device)
        return exact_norms.exact_bound(
            upstream, u, norms, weight=self.weight, bias=self.bias, slack=slack
        )

    def size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the norm of ``g`` times that of the columns, taken as at least 1. ``[B]``."""
        assert input_norms is not None
        return self.size_of(g, self.with_one(input_norms))

    def size_of(self, g: Tensor, columns: Tensor) -> Tensor:
        """Return `size`, given the columns' norms from `with_one`.

        It covers terms of the exact bound that may overflow before they cancel.
        """
        return norms.row_norms(g) * norms.row_norms(columns).clamp(min=1)

    def cheap_size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the norm of ``g``: no terms cancel in the weighted and the product bound."""
        return norms.row_norms(g)
