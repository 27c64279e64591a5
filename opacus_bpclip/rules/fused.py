"""Layers whose whole gradient is at hand in closed form, so that one autograd node clips it.

A layer ``y_p = W u_p + b``, its columns scaled by ``s_p``, its upstream gradient by ``f``, has

    y_p = b + s_p (W u_p),    dW = sum_p (f s_p) g_p u_p^T,    db = sum_p f g_p,
    du_p = s_p W^T (f g_p)

So neither a scaled input nor a second scaled gradient is ever made: the output is scaled in place,
and one product ``(f s_p) g_p`` serves weight and input.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from opacus_bpclip.rules.bounds import Bound
from opacus_bpclip.rules.exact_norms import own_bound, own_is_cheaper
from opacus_bpclip.rules.matrix import MatrixRule
from opacus_bpclip.rules.norms import accumulation, smallest_column_norm
from opacus_bpclip.rules.precision import norm_dtype, rounding_margin


class Scaled(NamedTuple):
    """An input that is scaled, and never made as a whole.

    Attributes:
        x: the input, not scaled.
        columns: norms from `with_one`, of the scaled columns; ``None`` if the bound needs none.
        factor: from `clip_factor`, by which to scale; ``None`` for 1.
        max_norm: what the columns' norms are clipped to.
    """

    x: Tensor
    columns: Tensor | None
    factor: Tensor | None
    max_norm: float | None


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

    def sums_own(self, bound: Bound, g: Tensor) -> bool:
        """Return whether to make each example's own gradient, measure it and add it up.

        Args:
            bound: how it is to be bounded.
            g: as for `exact`.
        """
        if not bound.is_norm or not self.weight or not g.shape[0]:
            return False
        channels, positions = self.upstream(g).shape[2:]
        # One position's gradient is an outer product, whose norm is known without it.
        return positions > 1 and own_is_cheaper(positions, channels, self.column_size())

    def bound_of_own(self, own: Tensor, g: Tensor, columns: Tensor) -> Tensor:
        """Return the exact bound for gradients that have been made. ``[B]``.

        Args:
            own: from `own_gradients`.
            g: as for `exact`.
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

    def shortest_column(self, dtype: torch.dtype) -> float:
        """Return what no norm from `with_one` is below, for upstream gradients of this dtype."""
        return smallest_column_norm(norm_dtype(dtype), weight=self.weight, bias=self.bias)

    def least_exact(self, dtype: torch.dtype) -> float:
        """Return `Bound.least` for the exact bound: what it adds for rounding."""
        return self.shortest_column(dtype) * rounding_margin(dtype, torch.device("cpu"))

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
