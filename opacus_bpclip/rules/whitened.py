"""Linear layers and convolutions whose weight's gradient is whitened: ``sum_p g_p (M u_p)^T``.

``M`` is a public matrix for each group. The bias's gradient is as without it. Proof:
``docs/guarantee.md``, "Whitened inputs".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms as bounds
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.matrix import Measured
from opacus_bpclip.rules.precision import rounding_margin

# The number of examples whose gradients are summed before the sum is whitened.
_MOST_ROWS = 1024


class PublicMatrix(NamedTuple):
    """``M = s (I - V diag(e) V^T)`` of each group: symmetric, with ``s`` the largest eigenvalue.

    Attributes:
        scale: ``s``, ``[R]``.
        directions: ``V``, ``[R, D, K]``, its columns orthonormal or zero.
        shrinkage: ``e``, ``[R, K]``, at least 0 and below 1.
    """

    scale: Tensor
    directions: Tensor
    shrinkage: Tensor

    def times(self, rows: Tensor) -> Tensor:
        """Multiply rows, ``[R, *, D]``, by the matrix of each group.

        One product for each group is many times faster than one for each example.
        """
        # A difference of two products: not in half precision.
        dtype = torch.promote_types(rows.dtype, self.scale.dtype)
        scale, directions, shrinkage = (own.to(dtype) for own in self)
        scale, flat = scale.view(-1, 1, 1), rows.flatten(1, -2).to(dtype)
        along = torch.bmm(flat, directions) * (scale * shrinkage.unsqueeze(1))
        made = flat * scale
        made.baddbmm_(along, directions.transpose(1, 2), alpha=-1)
        return made.view(rows.shape)


@dataclass(frozen=True, eq=False)
class WhitenedRule(FusedRule):
    """A layer's rule for the whitened gradient. Inputs are measured and clipped as without it.

    Attributes:
        one: the rule of the layer, with a weight's gradient of ``[R * C, D]``.
        matrix: ``M``.
    """

    one: FusedRule
    matrix: PublicMatrix

    @classmethod
    def of(cls, rule: FusedRule, matrix: PublicMatrix) -> Self:
        """Make the rule from that of the layer."""
        return cls(rule.weight, rule.bias, rule, matrix)

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Refuse: the matrix is not the module's.

        Raises:
            TypeError: always.
        """
        raise TypeError("A whitened rule is made from another rule.")

    def stretched(self, columns: Tensor) -> Tensor:
        """Return upper bounds on the norms of whitened columns, given `with_one` of those before.

        They only serve as margins for rounding errors, and so have room for those of the gradient
        and of two products with the matrix.
        """
        return columns * (2 * self.matrix.scale.amax()).clamp(min=1).to(columns.dtype)

    def columns(self, x: Tensor) -> Tensor:
        """Return the whitened columns, ``[B, R, D, P]``."""
        columns = self.one.columns(x).transpose(2, 3)
        return self.matrix.times(columns.movedim(1, 0)).movedim(0, 1).transpose(2, 3)

    def exact_of_columns(self, upstream: Tensor, u: Tensor, norms: Tensor) -> Tensor:
        """Return the exact bound, by the norms of the whitened columns themselves.

        The sum over the batch is whitened after it is made, so that its rounding errors are
        relative to the columns before that. ``norms`` are those from `stretched`.
        """
        length = torch.linalg.vector_norm(u, dim=2, dtype=norms.dtype)
        length = length + bounds.underflow(self.column_size(), norms.dtype)
        exact = super().exact_of_columns(upstream, u, self.one.with_one(length))
        slack = rounding_margin(upstream.dtype, upstream.device)
        return exact + slack * bounds.row_norms(upstream) * bounds.row_norms(norms)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Whiten the gradient of the weight; that of the input does not depend on ``x``.

        The rounding errors of a sum grow with the number of its terms, and whitening scales them
        up, so that it adds sums of a limited number.
        """
        if wanted[1] and g.shape[0] > _MOST_ROWS:
            return self._gradients_of_many(g, x, weight, multiplier, wanted[0])
        dx, dw = self.one.gradients(g, x, weight, multiplier=multiplier, wanted=wanted)
        return dx, None if dw is None else self._whitened_sum(dw, weight)

    def _gradients_of_many(
        self, g: Tensor, x: Tensor, weight: Tensor, multiplier: int, wants_input: bool
    ) -> tuple[Tensor | None, Tensor]:
        both = (wants_input, True)
        if not torch.compiler.is_compiling():
            parts = [
                self.gradients(*part, weight, multiplier=multiplier, wanted=both)
                for part in zip(g.split(_MOST_ROWS), x.split(_MOST_ROWS), strict=True)
            ]
            dx = torch.cat([own for own, _ in parts if own is not None]) if wants_input else None
            return dx, torch.stack([own for _, own in parts if own is not None]).sum(dim=0)
        # A graph for batches of any size has no parts, so that its sum is one of double precision.
        exact = (_exact(g), _exact(x), _exact(weight))
        dx, _ = self.one.gradients(g, x, weight, multiplier=multiplier, wanted=(wants_input, False))
        _, dw = self.one.gradients(*exact, multiplier=multiplier, wanted=(False, True))
        assert dw is not None
        return dx, self._whitened_sum(dw, weight).to(g.dtype)

    def _whitened_sum(self, dw: Tensor, weight: Tensor) -> Tensor:
        # An accelerator may round the factors of float32 products: here it would round the sum of
        # all examples, and not each example's part.
        return self._whitened(_exact(dw), weight).to(dw.dtype)

    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Whiten each example's gradient."""
        return self._whitened(self.one.own_gradients(g, x, weight), weight)

    def own_bytes(self, g: Tensor, weight: Tensor) -> int:
        """Count the gradient before and after."""
        return self.one.own_bytes(g, weight) + super().own_bytes(g, weight)

    def _whitened(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Multiply gradients of the weight, ``[*, *weight.shape]``, by the matrix of each group."""
        groups = len(self.matrix.scale)
        rows = gradient.reshape(-1, groups, weight.shape[0] // groups, self.column_size())
        return self.matrix.times(rows.movedim(1, 0)).movedim(0, 1).reshape(gradient.shape)

    def least_exact(self, dtype: torch.dtype) -> float:
        """Return 0: the size is computed in every case."""
        return 0.0

    # All else is that of the layer without whitening.

    def expected_dims(self) -> tuple[int, int | None]:
        """Return the layer's."""
        return self.one.expected_dims()

    def batch_axis(self, default: int) -> int:
        """Return the layer's."""
        return self.one.batch_axis(default)

    def measure(self, x: Tensor) -> Measured:
        """Measure the columns before they are whitened."""
        return self.one.measure(x)

    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Clip the columns before they are whitened."""
        return self.one.clip_factor(norms, max_norm, x)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the columns' factors so that they broadcast over the input."""
        return self.one.spread(factor, x)

    def upstream(self, g: Tensor) -> Tensor:
        """View the upstream gradient as ``[B, R, C, P]``."""
        return self.one.upstream(g)

    def column_size(self) -> int:
        """Return the number of inputs per group."""
        return self.one.column_size()

    def over_output(self, factor: Tensor, y: Tensor) -> Tensor:
        """View factors so that they broadcast over the output."""
        return self.one.over_output(factor, y)

    def with_bias(self, y: Tensor, by: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        """Return ``b + s (y - b)``."""
        return self.one.with_bias(y, by, bias, out)

    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Return the sum of the examples' gradients of the bias."""
        return self.one.bias_gradient(g, factor)


def _exact(x: Tensor) -> Tensor:
    """Return a tensor in double precision, where the device has it."""
    return x if x.device.type == "mps" else x.double()
