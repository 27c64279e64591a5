"""Layers whose whole gradient is at hand in closed form, so that one autograd node clips it.

A layer ``y_p = W u_p + b``, its columns scaled by ``s_p``, its upstream gradient by ``f``, has

    y_p = b + s_p (W u_p),    dW = sum_p (f s_p) g_p u_p^T,    db = sum_p f g_p,
    du_p = s_p W^T (f g_p)

So neither a scaled input nor a second scaled gradient is ever made: the output is scaled in place,
and one product ``(f s_p) g_p`` serves weight and input.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from opacus_bpclip.rules.exact_norms import own_bound, own_is_cheaper
from opacus_bpclip.rules.matrix import MatrixRule
from opacus_bpclip.rules.norms import (
    accumulation,
    max_column_norm,
    norm_dtype,
    rounding_margin,
    smallest_column_norm,
)


class FusedRule(MatrixRule):
    """What a node needs to stand in for its layer's autograd. Batch first, throughout."""

    def is_closed(self) -> bool:
        """Return whether the layer's own kernels compute `gradients` for this geometry."""
        return True

    @abstractmethod
    def over_output(self, factor: Tensor, y: Tensor) -> Tensor:
        """View factors, ``[B, 1, 1]`` or ``[B, 1, P]``, so that they broadcast over the output."""

    @abstractmethod
    def with_bias(self, y: Tensor, by: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        """Return ``b + s (y - b)``, exactly ``y`` where ``s`` is 1.

        Args:
            y: the layer's output.
            by: ``s``, from `over_output`.
            bias: ``b``, ``[C]``.
            out: where to put it; ``None`` for new memory.
        """

    @abstractmethod
    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight, by the layer's own kernels.

        Args:
            g: upstream gradient, scaled.
            x: the input, not scaled.
            weight: the layer's.
            multiplier: of the weight's gradient alone.
            wanted: whether the input's and the weight's are needed.
        """

    @abstractmethod
    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return each example's gradient of the weight, in one tensor. ``[B, *weight.shape]``.

        Args:
            g: upstream gradient, scaled by the columns' factors; ``B`` above 0.
            x: the input, not scaled.
            weight: the layer's.
        """

    def oriented(self, upstream: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two in the order of the weight's axes: ``[B, R, C, P]``, ``[B, R, D, P]``."""
        return upstream, columns

    def own_bytes(self, g: Tensor, weight: Tensor) -> int:
        """Return the bytes of temporary memory that `own_gradients` takes for an example."""
        return weight.numel() * norm_dtype(g.dtype).itemsize

    @abstractmethod
    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Return the sum of the examples' gradients of the bias, ``[C]``.

        Args:
            g: upstream gradient.
            factor: ``[B]``, of each example.
        """

    def bound_of_scaled(
        self,
        kind: str,
        g: Tensor,
        x: Tensor,
        columns: Tensor | None,
        factor: Tensor | None,
        max_norm: float | None,
        room: Tensor | None,
    ) -> Tensor:
        """Return `bound` for the input ``x`` scaled by ``factor``, which is never made as a whole.

        Args:
            kind: as for `bound`.
            g: as for `bound`.
            x: the input, not scaled.
            columns: norms from `with_one`, of the scaled columns.
            factor: from `clip_factor`, ``None`` for 1.
            max_norm: as for `bound`.
            room: as ``g``, overwritten; saves fresh memory.
        """
        if kind != "exact":
            return self.cheap_bound(kind, g, columns, max_norm, room)
        assert columns is not None
        return self.exact_bound(self.upstream(g), x, columns, factor)

    def sums_own(self, kind: str, g: Tensor) -> bool:
        """Return whether to make each example's own gradient, measure it and add it up.

        Args:
            kind: as for `bound`.
            g: as for `bound`.
        """
        if kind != "exact" or not self.weight or not len(g):
            return False
        channels, positions = self.upstream(g).shape[2:]
        # One position's gradient is an outer product, whose norm is known without it.
        return positions > 1 and own_is_cheaper(positions, channels, self.column_size())

    def bound_of_own(self, own: Tensor, g: Tensor, columns: Tensor) -> Tensor:
        """Return the exact bound for gradients that have been made. ``[B]``.

        Args:
            own: from `own_gradients`.
            g: as for `bound`.
            columns: norms from `with_one`, of the scaled columns.
        """
        upstream = self.upstream(g)
        batch, groups, _, positions = upstream.shape
        norm = torch.linalg.vector_norm(own.view(batch, groups, -1), dim=2)
        if self.bias:
            sums = upstream.sum(dim=3, dtype=own.dtype)
            norm = torch.hypot(norm, torch.linalg.vector_norm(sums, dim=2))
        slack = rounding_margin(g.dtype, g.device)
        bound = own_bound(norm, upstream, columns, inputs=self.column_size(), slack=slack)
        return bound * accumulation(positions, g.dtype)

    def least_bound(self, kind: str, dtype: torch.dtype, max_norm: float | None) -> float:
        """Return what part of `size` a bound is at least; 0 where that is not known.

        A bound of some positions' sum is at least the shortest column's norm times the upstream
        gradient's; an exact one is at least what it adds for rounding. With 1 or more, the bound
        alone tells whether it is in range.

        Args:
            kind: as for `bound`.
            dtype: of the upstream gradient.
            max_norm: as for `bound`.
        """
        if kind == "product":
            assert max_norm is not None
            return max_column_norm(max_norm, weight=self.weight, bias=self.bias)
        shortest = smallest_column_norm(norm_dtype(dtype), weight=self.weight, bias=self.bias)
        if kind == "weighted":
            return shortest
        return shortest * rounding_margin(dtype, torch.device("cpu"))

    def rescaled(self, y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``b + s (y - b)``, in place outside of a traced graph.

        Args:
            y: the layer's output for the unscaled input.
            factor: ``s``, from `clip_factor`.
            bias: ``b``, trainable or not.
        """
        out = None if torch.compiler.is_compiling() else y
        by = self.over_output(factor.to(y.dtype), y)
        if bias is None:
            return torch.mul(y, by, out=out)
        # Autocast computes the output in another dtype than the bias has.
        return self.with_bias(y, by, bias.to(y.dtype), out)
