"""Layers with one weight product, ``dW = sum_p g_p u_p^T``, and perhaps a bias.

``B`` examples, ``R`` groups, ``C`` output channels and ``D`` inputs per group, ``P`` positions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from opacus_bpclip.rules import exact_norms, norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule


class Measured(NamedTuple):
    """An input's norms.

    Attributes:
        norms: ``[B, R, P]``, of its columns.
        total: ``[B]``, finite where every number of the example is, and its square.
    """

    norms: Tensor
    total: Tensor


@dataclass(frozen=True)
class MatrixRule(Rule):
    """The shared part: a subclass says what the columns of its layer's input are."""

    clips_input: ClassVar[bool] = True

    @abstractmethod
    def measure(self, x: Tensor) -> Measured:
        """Measure the columns of the input ``x``, ``[B, ...]``."""

    @abstractmethod
    def clip_factor(self, norms: Tensor, max_norm: float) -> Tensor:
        """Return the factors, at most 1, that bring every column of the norms below ``max_norm``.

        Shaped as ``norms``, or with axes of size 1 where one factor serves several columns.
        """

    @abstractmethod
    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the factors of `clip_factor` so that they broadcast over the input."""

    @abstractmethod
    def upstream(self, g: Tensor) -> Tensor:
        """View the gradient of the layer's output as ``[B, R, C, P]``."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """Lay the input's columns out as ``[B, R, D, P]``."""

    @abstractmethod
    def column_size(self) -> int:
        """Return ``D``."""

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Scale every column down to ``max_norm``."""
        (x,) = inputs
        assert x is not None
        column_norms, total = self.measure(x)
        finite = total.isfinite()
        if max_norm is None:
            return Prepared(inputs, column_norms, finite)
        factor = self.clip_factor(column_norms, max_norm)
        scale = self.spread(factor.to(x.dtype), x)
        return Prepared((x * scale,), column_norms * factor, finite, (scale,))

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return `product_bound`. Source: design section 3, proofs in docs/guarantee.md."""
        return self.product_bound(g, max_norm)

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return `weighted_bound`."""
        assert input_norms is not None
        return self.weighted_bound(g, self.with_one(input_norms))

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return `exact_bound`."""
        (x,) = inputs
        assert x is not None
        assert input_norms is not None
        return self.exact_bound(self.upstream(g), x, self.with_one(input_norms))

    def with_one(self, input_norms: Tensor) -> Tensor:
        """Return the norms of the columns with the bias's entry, from those without."""
        return norms.column_norms(input_norms, weight=self.weight, bias=self.bias)

    def largest_column(self, max_norm: float | None) -> float:
        """Return the largest norm of a column with the bias's entry."""
        assert max_norm is not None
        return norms.max_column_norm(max_norm, weight=self.weight, bias=self.bias)

    def product_bound(
        self, g: Tensor, max_norm: float | None, room: Tensor | None = None
    ) -> Tensor:
        """Return the product bound.

        Args:
            g: as for `product`.
            max_norm: as for `product`.
            room: as ``g``, overwritten; saves fresh memory.
        """
        upstream, room = self.upstream(g), room if room is None else self.upstream(room)
        bound = norms.product_bound(upstream, self.largest_column(max_norm), room)
        return bound * norms.accumulation(upstream.shape[3], g.dtype)

    def weighted_bound(self, g: Tensor, columns: Tensor, room: Tensor | None = None) -> Tensor:
        """Return the weighted bound.

        Args:
            g: as for `weighted`.
            columns: norms from `with_one`.
            room: as ``g``, overwritten; saves fresh memory.
        """
        upstream, room = self.upstream(g), room if room is None else self.upstream(room)
        bound = norms.weighted_bound(upstream, columns, room)
        return bound * norms.accumulation(upstream.shape[3], g.dtype)

    def exact_bound(
        self, upstream: Tensor, x: Tensor, columns: Tensor, factor: Tensor | None = None
    ) -> Tensor:
        """Return the norm itself, a chunk of examples at a time.

        Args:
            upstream: ``[B, R, C, P]``.
            x: the input, ``[B, ...]``.
            columns: norms from `with_one`, of the scaled columns.
            factor: from `clip_factor`, by which ``x`` is still to be scaled; ``None`` for 1.
        """
        batch, groups, channels, positions = upstream.shape
        dtype = columns.dtype
        needed = exact_norms.exact_bytes(positions, groups, channels, self.column_size(), dtype)
        chunk = exact_norms.exact_chunk(needed, x.device)

        def of(rows: slice) -> Tensor:
            part = x[rows]
            if factor is not None:
                part = part * self.spread(factor[rows].to(part.dtype), part)
            return exact_norms.exact_bound(
                upstream[rows],
                self.columns(part),
                columns[rows],
                weight=self.weight,
                bias=self.bias,
                slack=precision.rounding_margin(upstream.dtype, upstream.device),
            )

        return exact_norms.in_chunks(batch, chunk, of) * norms.accumulation(positions, dtype)

    def size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the upstream gradient's norm times the columns', if that is above 1."""
        assert input_norms is not None
        return self.size_of(g, self.with_one(input_norms))

    def size_of(self, g: Tensor, columns: Tensor) -> Tensor:
        """Return `size` for columns of these norms, from `with_one`.

        What cancels in the exact bound may overflow before it does.
        """
        return norms.row_norms(g) * norms.row_norms(columns).clamp(min=1)

    def cheap_size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the upstream gradient's norm: nothing cancels in the other bounds."""
        return norms.row_norms(g)
