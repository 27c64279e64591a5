"""Rules with closed forms of all gradients, which one autograd node computes and clips.

Scale the columns of a layer ``y_p = W u_p + b`` by ``s_p`` and its upstream gradient by ``f``. Then

    y_p = b + s_p (W u_p),    dW = sum_p (f s_p) g_p u_p^T,    db = sum_p f g_p,
    du_p = s_p W^T (f g_p)

So the scaled input is never built: the output is scaled in place, and the one product
``(f s_p) g_p`` serves the gradients of weight and input.
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
    """An input with the factors of its columns; the scaled input itself is never built.

    Attributes:
        x: the input, not scaled.
        columns: the norms of the scaled columns, from `with_one`; ``None`` if the bound needs none.
        factor: the columns' factors, from `clip_factor`; ``None`` for 1.
        max_norm: the norm that the columns are clipped to; ``None`` if they are not.
    """

    x: Tensor
    columns: Tensor | None
    factor: Tensor | None
    max_norm: float | None


class FusedRule(MatrixRule):
    """Base class of rules that replace a layer's autograd. All tensors are batch first."""

    def is_closed(self) -> bool:
        """Return whether the closed forms hold for this layer's options."""
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
            out: the tensor to write to; ``None`` allocates.
        """

    @abstractmethod
    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight, computed by the layer's own kernels.

        Args:
            g: upstream gradient, scaled.
            x: the input, not scaled.
            weight: the layer's weight.
            multiplier: the factor of the weight's gradient, not of the input's.
            wanted: whether the gradients of input and weight are needed.
        """

    @abstractmethod
    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the per-example gradients of the weight, ``[B, *weight.shape]``.

        Args:
            g: upstream gradient, scaled by the columns' factors; ``B`` above 0.
            x: the input, not scaled.
            weight: the layer's weight.
        """

    def oriented(self, upstream: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return both in the order of the weight's axes, by default upstream gradient first.

        Args:
            upstream: ``[B, R, C, P]``.
            columns: ``[B, R, D, P]``.
        """
        return upstream, columns

    def own_bytes(self, g: Tensor, weight: Tensor) -> int:
        """Return the bytes of temporary memory that `own_gradients` takes for one example."""
        return weight.numel() * norm_dtype(g.dtype).itemsize

    @abstractmethod
    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Return the sum of the examples' gradients of the bias, ``[C]``.

        Args:
            g: upstream gradient.
            factor: ``[B]``, the examples' factors.
        """

    def sums_own(self, bound: Bound, g: Tensor) -> bool:
        """Return whether to build the per-example gradients, measure them and add them up.

        Args:
            bound: the bound on an example's gradient.
            g: gradient of the layer's output, batch first.
        """
        if not bound.is_norm or not self.weight or not g.shape[0]:
            return False
        channels, positions = self.upstream(g).shape[2:]
        return self.makes_own(positions, channels)

    def makes_own(self, positions: int, channels: int) -> bool:
        """Return whether per-example gradients cost less to build than columns to multiply."""
        # One position's gradient is an outer product, whose norm is known without it.
        return positions > 1 and own_is_cheaper(positions, channels, self.column_size())

    def bound_of_own(self, own: Tensor, g: Tensor, columns: Tensor) -> Tensor:
        """Return the exact bound, given the per-example gradients of the weight. ``[B]``.

        Args:
            own: the gradients, from `own_gradients`.
            g: gradient of the layer's output, batch first.
            columns: the norms of the scaled columns, from `with_one`.
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
        """Return a lower bound on the norms from `with_one`, for a gradient of this dtype."""
        return smallest_column_norm(norm_dtype(dtype), weight=self.weight, bias=self.bias)

    def least_exact(self, dtype: torch.dtype) -> float:
        """Return `Bound.least` for the exact bound, which is at least its margin for rounding."""
        return self.shortest_column(dtype) * rounding_margin(dtype, torch.device("cpu"))

    def rescaled(self, y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``b + s (y - b)``; it overwrites ``y``, but not in a traced graph.

        Args:
            y: the layer's output for the unscaled input.
            factor: ``s``, from `clip_factor`.
            bias: ``b``, trainable or not; ``None`` if the layer has none.
        """
        out = None if torch.compiler.is_compiling() else y
        by = self.over_output(factor.to(y.dtype), y)
        if bias is None:
            return torch.mul(y, by, out=out)
        # Under autocast the output's dtype is not the bias's.
        return self.with_bias(y, by, bias.to(y.dtype), out)
