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
from opacus_bpclip.rules.exact_norms import chunks, exact_chunk
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.matrix import Measured
from opacus_bpclip.rules.precision import rounding_margin

# The number of terms that one product in single precision sums, of examples times positions.
_MOST_TERMS = 4096


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

        Kept gradients are whitened after they are made, so that their rounding errors are relative
        to the columns before that. ``norms`` are those from `stretched`.
        """
        length = torch.linalg.vector_norm(u, dim=2, dtype=norms.dtype)
        length = length + bounds.underflow(self.column_size(), norms.dtype)
        exact = super().exact_of_columns(upstream, u, self.one.with_one(length))
        slack = rounding_margin(upstream.dtype, upstream.device)
        return exact + slack * bounds.row_norms(upstream) * bounds.row_norms(norms)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Whiten what is summed, columns or per-example gradients, for a few examples at a time.

        A sum that is whitened after it is made has its rounding errors scaled up, and in many
        examples that adds up. The gradient of the input does not depend on ``x``, and is not
        whitened.
        """
        dx, dw = None, None
        if wanted[0]:
            alone = (True, False)
            dx, _ = self.one.gradients(g, x, weight, multiplier=multiplier, wanted=alone)
        if wanted[1]:
            dw = self._sum(g, x, weight).reshape(weight.shape) * multiplier
        return dx, dw

    def _sum(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        upstream = self.upstream(g)
        batch, groups, channels, positions = upstream.shape
        makes_own = self.makes_own(positions, channels)
        needed = 8 * groups * positions * (channels + 3 * self.column_size())
        if makes_own:
            needed = self.own_bytes(g, weight)
        total: Tensor | None = None
        # A product of many terms rounds them in an order that depends on their number. Where it
        # takes all examples at once, it is one of double precision.
        most = max(1, _MOST_TERMS // positions)
        dtype = _exact(g[:0]).dtype if torch.compiler.is_compiling() else g.dtype
        for rows in chunks(batch, min(most, exact_chunk(needed, g.device))):
            if makes_own:
                part = self.own_gradients(g[rows], x[rows], weight).sum(dim=0, dtype=dtype)
            else:
                # The product with the matrix is one of double precision, so that the sum is
                # rounded as without whitening, relative to what is measured.
                u = self.columns(_exact(x[rows])).to(dtype)
                part = torch.einsum("brcp,brdp->rcd", upstream[rows].to(dtype), u)
            total = part if total is None else total + part
        assert total is not None
        return total.to(g.dtype)

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
