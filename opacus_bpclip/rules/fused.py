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

from opacus_bpclip.norms import (
    max_column_norm,
    norm_dtype,
    rounding_margin,
    smallest_column_norm,
)
from opacus_bpclip.rules.matrix import MatrixRule


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
        return self.with_bias(y, by, bias, out)
