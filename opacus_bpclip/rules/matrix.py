"""Layers with one weight product, ``dW = sum_p g_p u_p^T``, and perhaps a bias.

``B`` examples, ``R`` groups, ``C`` output channels and ``D`` inputs per group, ``P`` positions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from opacus_bpclip.rules import exact_norms, norms
from opacus_bpclip.rules.base import Inputs, Keep, Prepared, Rule


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

    def keeps(self, kind: str) -> Keep:
        """Keep the map of norms, and for the exact bound the input that the layer keeps anyway."""
        return Keep(inputs=kind == "exact", norms=kind != "product")

    def bound(
        self,
        kind: str,
        g: Tensor,
        inputs: Inputs,
        input_norms: Tensor | None,
        max_norm: float | None,
    ) -> Tensor:
        """Return the bound of this kind. Source: design section 3, proofs in docs/guarantee.md."""
        if kind != "exact":
            columns = None if input_norms is None else self.with_one(input_norms)
            return self.cheap_bound(kind, g, columns, max_norm)
        (x,) = inputs
        assert x is not None
        assert input_norms is not None
        return self.exact_bound(self.upstream(g), x, self.with_one(input_norms))

    def with_one(self, input_norms: Tensor) -> Tensor:
        """Return the norms of the columns with the bias's entry, from those without."""
        return norms.column_norms(input_norms, weight=self.weight, bias=self.bias)

    def cheap_bound(
        self,
        kind: str,
        g: Tensor,
        columns: Tensor | None,
        max_norm: float | None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Return the product or the weighted bound, for which norms are enough.

        Args:
            kind: as for `bound`.
            g: as for `bound`.
            columns: norms from `with_one`; not needed for the product bound.
            max_norm: as for `bound`.
            room: as ``g``, overwritten; saves fresh memory.
        """
        upstream = self.upstream(g)
        room = room if room is None else self.upstream(room)
        rounded = norms.accumulation(upstream.shape[3], g.dtype)
        if kind == "product":
            assert max_norm is not None
            largest = norms.max_column_norm(max_norm, weight=self.weight, bias=self.bias)
            return norms.product_bound(upstream, largest, room) * rounded
        assert columns is not None
        return norms.weighted_bound(upstream, columns, room) * rounded

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
                slack=norms.rounding_margin(upstream.dtype, upstream.device),
            )

        return exact_norms.in_chunks(batch, chunk, of) * norms.accumulation(positions, dtype)

    def size(self, kind: str, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the upstream gradient's norm, in the exact bound times the columns' if above 1."""
        return self.size_of(kind, g, None if input_norms is None else self.with_one(input_norms))

    def size_of(self, kind: str, g: Tensor, columns: Tensor | None) -> Tensor:
        """Return `size` for columns of these norms, from `with_one`.

        What cancels in the exact bound may overflow before it does.
        """
        size = norms.row_norms(g)
        if kind != "exact":
            return size
        assert columns is not None
        return size * norms.row_norms(columns).clamp(min=1)
