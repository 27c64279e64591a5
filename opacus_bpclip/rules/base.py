"""What a rule is: how one layer's input is measured and its gradient bounded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip import norms


class Measured(NamedTuple):
    """An input's norms.

    Attributes:
        norms: ``[B, R, P]``, the L2 norm of each column that enters the weight product.
        finite: ``[B]`` bool, whether every number of the example is finite.
    """

    norms: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Rule(ABC):
    """A layer with one weight product, ``dW = sum_p g_p u_p^T``, and perhaps a bias.

    Immutable, made once from a module, and works on tensors alone, so that it can be traced.
    ``B`` examples, ``R`` groups, ``C`` output channels and ``D`` inputs per group, ``P`` positions.

    Attributes:
        methods: what a subclass of the layer must not override for the rule to hold.
        weight: whether the layer has a trainable weight.
        bias: whether the layer has a trainable bias.
    """

    methods: ClassVar[tuple[str, ...]] = ("forward",)

    weight: bool
    bias: bool

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry.

        Raises:
            CoverageError: the layer is of a supported class but configured beyond this rule.
        """

    @abstractmethod
    def expected_dims(self) -> tuple[int, int | None]:
        """Return the smallest and the largest number of axes of a batched input."""

    @abstractmethod
    def measure(self, x: Tensor) -> Measured:
        """Measure the columns of the input ``x``, ``[B, ...]``."""

    @abstractmethod
    def clip_factor(self, norms: Tensor, max_norm: float) -> Tensor:
        """Return the factors, at most 1, that bring every column of the norms below ``max_norm``.

        Shaped as `norms`, or with axes of size 1 where one factor serves several columns.
        """

    @abstractmethod
    def scale_input(self, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply the input by the factors of `clip_factor`."""

    @abstractmethod
    def upstream(self, g: Tensor) -> Tensor:
        """View the gradient of the layer's output as ``[B, R, C, P]``."""

    @abstractmethod
    def columns(self, x: Tensor) -> Tensor:
        """Lay the input's columns out as ``[B, R, D, P]``."""

    @abstractmethod
    def column_size(self) -> int:
        """Return ``D``."""

    def bound(
        self, g: Tensor, x: Tensor | None, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return an upper bound on the norm of each example's gradient, ``[B]``.

        Args:
            g: gradient of the layer's output.
            x: the layer's (clipped) input, for the exact bound.
            input_norms: its norms, for the weighted and the exact bound.
            max_norm: what the input's norms were clipped to, for the product bound.
        """
        upstream = self.upstream(g)
        if input_norms is None:
            assert max_norm is not None
            largest = norms.max_column_norm(max_norm, weight=self.weight, bias=self.bias)
            return norms.product_bound(upstream, largest)
        columns = norms.column_norms(input_norms, weight=self.weight, bias=self.bias)
        if x is None:
            return norms.weighted_bound(upstream, columns)
        return self._exact_bound(upstream, x, columns)

    def _exact_bound(self, upstream: Tensor, x: Tensor, columns: Tensor) -> Tensor:
        batch, groups, channels, positions = upstream.shape
        dtype = columns.dtype
        # Both sides at unit norm: no square over- or underflows, and x is smaller than its columns.
        g_norm = torch.linalg.vector_norm(upstream, dim=(1, 2, 3), dtype=dtype)
        g_norm = g_norm + norms.underflow(upstream[0].numel() if batch else 1, dtype)
        u_norm = torch.linalg.vector_norm(columns, dim=(1, 2))
        u_norm = u_norm + norms.underflow(groups * positions, dtype)
        chunk = norms.exact_chunk(positions, groups, channels, self.column_size(), dtype.itemsize)
        bounds = []
        for start in range(0, max(batch, 1), chunk):
            rows = slice(start, start + chunk)
            one = u_norm[rows].reciprocal()
            bounds.append(
                norms.exact_bound(
                    upstream[rows] / per_row(g_norm[rows], upstream),
                    self.columns(x[rows] * per_row(one, x)),
                    columns[rows] * per_row(one, columns),
                    one if self.bias else None,
                    weight=self.weight,
                    slack=norms.rounding_margin(upstream.dtype, upstream.device),
                )
            )
        unit = bounds[0] if len(bounds) == 1 else torch.cat(bounds)
        return unit * g_norm * u_norm + norms.underflow(1, dtype)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """View ``[B]`` so that it broadcasts over the rows of ``like``, ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def trainable(module: nn.Module, name: str) -> bool:
    """Return whether the module has a parameter of this name that requires a gradient."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad
