"""Base class of the rules for normalisation layers: LayerNorm, RMSNorm, GroupNorm, InstanceNorm.

Such a layer normalises each example, then applies an affine map, which alone has parameters. With
``n`` the normalised value, ``dgamma_c = sum_p g_cp n_cp`` and ``dbeta_c = sum_p g_cp``: the columns
of channel ``c`` are ``(n_cp, 1)``. Proof: ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_bpclip.rules import norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule
from opacus_bpclip.rules.cancellation import cancellation_factor


@dataclass(frozen=True)
class AffineRule(Rule):
    """Base class; a subclass says over which axes its layer normalises.

    Attributes:
        eps: the layer's ``eps``, added to the variance.
    """

    eps: float | None

    @abstractmethod
    def normalized(self, x: Tensor) -> Tensor:
        """Return the input normalised as the layer does, without its affine map."""

    @abstractmethod
    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradient of the input, and the per-example gradients of weight and bias.

        Args:
            g: upstream gradient, of the input's shape.
            x: the layer's input, ``[B, ...]``.
            weight: the layer's weight.
            wanted: whether the gradients of input, weight and bias are needed.

        Returns:
            The gradient of the input, ``None`` if not wanted; the wanted ones of
            ``dgamma_c = sum_p g_cp n_cp`` and ``dbeta_c = sum_p g_cp``, concatenated: ``[B, K]``.
        """

    @abstractmethod
    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return the gradient of the input alone.

        Args:
            g: upstream gradient, of the input's shape.
            x: the layer's input, ``[B, ...]``.
            weight: the layer's weight; ``None`` for ones.
        """

    def suppress_rounding(
        self, dx: Tensor, minuend: Tensor, axes: tuple[int, ...], *, centre: bool
    ) -> Tensor:
        """Scale the input's gradient down, in place, where it is mostly rounding error.

        The backward pass subtracts from the weighted upstream gradient its mean and its component
        along the normalised input. Where little remains, the remainder is rounding error: see
        `cancellation_factor`.

        Args:
            dx: the gradient of the input, as the layer's kernel has computed it.
            minuend: the norm over ``axes`` of the weighted upstream gradient, ``keepdim=True``.
            axes: the axes over which the layer normalises.
            centre: whether the layer subtracts the mean. It is then subtracted from ``dx`` once
                more, since the kernel's long sums leave a small one.
        """
        if centre:
            dx = dx.sub_(dx.mean(dim=axes, keepdim=True))
        remainder = torch.linalg.vector_norm(dx, dim=axes, keepdim=True)
        factor = cancellation_factor(remainder, minuend, dx.dtype)
        # Reading the flag would stall an accelerator and break a traced graph, so they multiply.
        if torch.compiler.is_compiling() or dx.device.type != "cpu" or bool((factor < 1).any()):
            dx = dx.mul_(factor)
        return dx

    @abstractmethod
    def centred(self, x: Tensor) -> Tensor:
        """Subtract the means; the layer's output does not depend on them."""

    @abstractmethod
    def channels_first(self, x: Tensor) -> Tensor:
        """View ``[B, ...]`` as ``[B, C, P]``, with one channel for each entry of the weight."""

    @abstractmethod
    def largest(self, x: Tensor) -> float:
        """Return the largest absolute value that a normalised input of ``x``'s shape can have."""

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Subtract the means; nothing is clipped, since normalisation fixes the output's scale.

        A mean far larger than the deviations cancels badly in the layer's arithmetic: the
        normalised values would be rounding errors, which the bounds do not cover. Autograd may
        treat the means as constants, since the gradient of the layer's input sums to zero over the
        normalised axes.
        """
        (x,) = inputs
        assert x is not None
        centred = self.centred(x)
        flat = centred.flatten(1)
        largest = torch.linalg.vector_norm(flat, float("inf"), dim=1)
        # Above this limit the layer's sum of squares may overflow. nan compares as False.
        finite = largest < math.sqrt(torch.finfo(x.dtype).max / (4 * max(flat.shape[1], 1)))
        return Prepared((centred,), None, finite)

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Bound every normalised value by the largest one possible."""
        upstream, _, rounded = self._upstream(g)
        largest = norms.max_column_norm(self.largest(g), weight=self.weight, bias=self.bias)
        return norms.product_bound(upstream[:, None], largest) * rounded

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Weight each entry of the upstream gradient by its column's norm."""
        upstream, slack, rounded = self._upstream(g)
        _, columns = self._columns(inputs, upstream.dtype)
        per_channel = (upstream.abs() * columns).sum(dim=2)
        return (torch.linalg.vector_norm(per_channel, dim=1) + slack) * rounded

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Compute the example's gradient; return its norm plus a margin for rounding."""
        upstream, slack, rounded = self._upstream(g)
        value, columns = self._columns(inputs, upstream.dtype)
        parts = []
        if self.weight:
            parts.append((upstream * value).sum(dim=2))
        if self.bias:
            parts.append(upstream.sum(dim=2))
        exact = torch.linalg.vector_norm(torch.cat(parts, dim=1), dim=1)
        frobenius = torch.linalg.vector_norm(upstream, dim=(1, 2)) * torch.linalg.vector_norm(
            columns, dim=(1, 2)
        )
        return (exact + precision.rounding_margin(g.dtype, g.device) * frobenius + slack) * rounded

    def _upstream(self, g: Tensor) -> tuple[Tensor, float, float]:
        """Return ``g`` as ``[B, C, P]``, its `underflow` and its `accumulation` (see `norms`)."""
        dtype = precision.norm_dtype(g.dtype)
        upstream = self.channels_first(g).to(dtype)
        slack = norms.underflow(upstream.shape[1] * upstream.shape[2], dtype)
        return upstream, slack, norms.accumulation(upstream.shape[2], dtype)

    def _columns(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the normalised input and its columns' norms, each ``[B, C, P]``."""
        (x,) = inputs
        assert x is not None
        value = self.channels_first(self.normalized(x)).to(dtype)
        return value, norms.column_norms(value.abs(), weight=self.weight, bias=self.bias)
