"""PReLU: the gradient of a slope is the sum of its channel's negative inputs times theirs.

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

from opacus_bpclip.rules import norms
from opacus_bpclip.rules.base import Inputs, Keep, Prepared, Rule, trainable


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
        """Accept any number of positions' axes."""
        return (1 if self.slopes == 1 else 2), None

    def batch_axis(self, default: int) -> int:
        """Return 0 for several slopes: PyTorch has their channels on the second axis."""
        return default if self.slopes == 1 else 0

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Leave the input alone; measure whether its squares are in range."""
        (x,) = inputs
        assert x is not None
        largest = torch.linalg.vector_norm(x.reshape(len(x), x.shape[1:].numel()), torch.inf, dim=1)
        # Comparing with nan gives False.
        return Prepared(inputs, None, largest < math.sqrt(torch.finfo(x.dtype).max))

    def keeps(self, kind: str) -> Keep:
        """Keep the input, as the layer does."""
        return Keep(inputs=True, norms=False)

    def bound(
        self,
        kind: str,
        g: Tensor,
        inputs: Inputs,
        input_norms: Tensor | None,
        max_norm: float | None,
    ) -> Tensor:
        """Return the bound of this kind; the product's largest column is the example's own."""
        (x,) = inputs
        assert x is not None
        dtype = norms.norm_dtype(g.dtype)
        upstream = self._by_slope(g).to(dtype)
        value = self._by_slope(x).to(dtype).clamp(max=0)
        columns = norms.column_norms(value.abs(), weight=True, bias=False)
        if kind == "product":
            sums = norms.product_bound(upstream.unsqueeze(1), 1.0)
            sums = sums * norms.accumulation(upstream.shape[2], dtype)
            return sums * columns.flatten(1).amax(dim=1) + norms.underflow(1, dtype)
        per_slope = (upstream.abs() * columns).sum(dim=2)
        slack = norms.underflow(self.slopes * upstream.shape[2], dtype)
        weighted = torch.linalg.vector_norm(per_slope, dim=1)
        if kind == "weighted":
            return weighted + slack
        exact = torch.linalg.vector_norm((upstream * value).sum(dim=2), dim=1)
        # Positions may cancel, but not their rounding errors. A vanishing column counts as one.
        frobenius = torch.linalg.vector_norm(upstream, dim=(1, 2))
        vanishing = norms.smallest_column(dtype) * frobenius
        return exact + norms.rounding_margin(g.dtype, g.device) * weighted + vanishing + slack

    def by_example(self, g: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
        """Add up each slope's positions."""
        (x,) = inputs
        assert x is not None
        value = self._by_slope(x).clamp(max=0)
        return {"weight": (self._by_slope(g) * value).sum(dim=2)}

    def _by_slope(self, x: Tensor) -> Tensor:
        """View ``[B, ...]`` as ``[B, C, P]``, a channel for each slope."""
        return x.reshape(len(x), self.slopes, x.shape[1:].numel() // self.slopes)
