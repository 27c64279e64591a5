"""Linear layers on vectors, and on inputs with further axes (tokens, time, pixels).

All axes between the first and the last are axes of positions. The columns are the positions' input
vectors, and input clipping scales each of them on its own. Proof: ``docs/rules/linear.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms as bounds
from opacus_bpclip.rules import precision
from opacus_bpclip.rules.base import per_row, trainable
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.matrix import Measured
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.Linear)
@dataclass(frozen=True)
class LinearRule(FusedRule):
    """``nn.Linear``: input ``[B, *, D]``, output ``[B, *, C]``, one group."""

    in_features: int

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        layer = cast(nn.Linear, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=trainable(layer, "bias"),
            in_features=layer.in_features,
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept ``[B, D]``, and any number of axes in between."""
        return 2, None

    def measure(self, x: Tensor) -> Measured:
        """Measure each position's vector."""
        dtype = precision.norm_dtype(x.dtype)
        norms = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
        norms = norms + bounds.underflow(self.in_features, dtype)
        norms = norms.reshape(x.shape[0], 1, x.shape[1:-1].numel())
        return Measured(norms, norms.sum(dim=(1, 2)))

    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Return one factor per position."""
        return (max_norm / norms).clamp(max=1)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the positions' factors so that they broadcast over the input."""
        return factor.view(*x.shape[:-1], 1)

    def upstream(self, g: Tensor) -> Tensor:
        """View ``[B, *, C]`` as ``[B, 1, C, P]``."""
        positions = g.shape[1:-1].numel()
        return g.reshape(g.shape[0], positions, g.shape[-1]).transpose(1, 2).unsqueeze(1)

    def columns(self, x: Tensor) -> Tensor:
        """View ``[B, *, D]`` as ``[B, 1, D, P]``."""
        return self.upstream(x)

    def column_size(self) -> int:
        """Return the number of input features."""
        return self.in_features

    def over_output(self, factor: Tensor, y: Tensor) -> Tensor:
        """View factors of positions or of examples so that they broadcast over the output."""
        return factor.view(*y.shape[:-1], 1) if factor.shape[2] > 1 else per_row(factor, y)

    def with_bias(self, y: Tensor, by: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        """Return ``b + s (y - b)``."""
        return torch.lerp(bias, y, by, out=out)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Multiply ``g`` with weight and input."""
        rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = (rows @ weight).view(x.shape) if wanted[0] else None
        dw = None
        if wanted[1]:
            if torch.compiler.is_compiling():
                # The compiler fuses this product. As `alpha`, the multiplier would be a constant of
                # the graph, which would be compiled again for each batch size.
                return dx, (rows.T @ columns) * multiplier
            # With `alpha` no second pass over the gradient, which may be large, is needed.
            unread = rows.new_empty(()).expand(weight.shape)
            dw = torch.addmm(unread, rows.T, columns, beta=0, alpha=multiplier)
        return dx, dw

    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each example's upstream gradient with its input."""
        dtype = precision.norm_dtype(g.dtype)
        positions = g.shape[1:-1].numel()
        rows, columns = (t.reshape(t.shape[0], positions, t.shape[-1]).to(dtype) for t in (g, x))
        return torch.matmul(rows.transpose(1, 2), columns)

    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Sum over the positions of all examples in one product."""
        rows = g.reshape(-1, g.shape[-1])
        repeated = factor.view(-1, 1).expand(-1, g.shape[1:-1].numel()).reshape(-1)
        return torch.mv(rows.T, repeated)
