"""PReLU: the gradient of a slope is ``sum_p g_p min(x_p, 0)`` over its channel's positions.

Proof: ``docs/rules/prelu.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule, trainable
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.PReLU)
@dataclass(frozen=True)
class PReLURule(Rule):
    """``nn.PReLU``: input ``[B, *]`` with one slope, ``[B, C, *]`` with ``C`` of them."""

    parameters: ClassVar[tuple[str, ...]] = ("weight",)

    slopes: int

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        layer = cast(nn.PReLU, module)
        return cls(weight=trainable(layer, "weight"), bias=False, slopes=layer.num_parameters)

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept any number of axes of positions."""
        return (1 if self.slopes == 1 else 2), None

    def batch_axis(self, default: int) -> int:
        """Return 0 for several slopes: PyTorch has their channels on the second axis."""
        return default if self.slopes == 1 else 0

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Return the input unchanged; check that its squares do not overflow."""
        (x,) = inputs
        assert x is not None
        largest = torch.linalg.vector_norm(
            x.reshape(x.shape[0], x.shape[1:].numel()), torch.inf, dim=1
        )
        # Comparing with nan gives False.
        return Prepared(inputs, None, largest < math.sqrt(torch.finfo(x.dtype).max))

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the product bound, with the norm of the example's largest column."""
        upstream, _, columns = self._parts(g, inputs)
        sums = norms.product_bound(upstream.unsqueeze(1), 1.0)
        sums = sums * norms.accumulation(upstream.shape[2], upstream.dtype)
        return sums * columns.flatten(1).amax(dim=1) + norms.underflow(1, upstream.dtype)

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the weighted bound."""
        upstream, _, columns = self._parts(g, inputs)
        return _weighted(upstream, columns) + self._slack(upstream)

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm."""
        upstream, value, columns = self._parts(g, inputs)
        exact = torch.linalg.vector_norm((upstream * value).sum(dim=2), dim=1)
        # Positions may cancel, but their rounding errors do not. Where all inputs are positive the
        # gradient is 0: the addend limits how far it can be scaled up.
        rounding = precision.rounding_margin(g.dtype, g.device) * _weighted(upstream, columns)
        frobenius = torch.linalg.vector_norm(upstream, dim=(1, 2))
        vanishing = norms.smallest_column(upstream.dtype) * frobenius
        return exact + rounding + vanishing + self._slack(upstream)

    def by_example(self, g: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
        """Sum over each slope's positions."""
        (x,) = inputs
        assert x is not None
        value = self._by_slope(x).clamp(max=0)
        return {"weight": (self._by_slope(g) * value).sum(dim=2)}

    def _parts(self, g: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return upstream gradient, negative inputs and columns' norms, each ``[B, C, P]``."""
        (x,) = inputs
        assert x is not None
        dtype = precision.norm_dtype(g.dtype)
        value = self._by_slope(x).to(dtype).clamp(max=0)
        columns = norms.column_norms(value.abs(), weight=True, bias=False)
        return self._by_slope(g).to(dtype), value, columns

    def _slack(self, upstream: Tensor) -> float:
        return norms.underflow(self.slopes * upstream.shape[2], upstream.dtype)

    def _by_slope(self, x: Tensor) -> Tensor:
        """View ``[B, ...]`` as ``[B, C, P]``, with one channel for each slope."""
        return x.reshape(x.shape[0], self.slopes, x.shape[1:].numel() // self.slopes)


def _weighted(upstream: Tensor, columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm((upstream.abs() * columns).sum(dim=2), dim=1)
