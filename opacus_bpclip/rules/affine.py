"""Normalisation within one example, followed by an affine map: what all such layers share.

The normalisation has no parameters; the affine map's gradient is diagonal. With ``n`` the
normalised value, ``dgamma_c = sum_p g_cp n_cp`` and ``dbeta_c = sum_p g_cp``: each channel has the
columns ``(n_cp, 1)``. Proof: ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_bpclip.rules import norms, precision
from opacus_bpclip.rules.base import Inputs, Prepared, Rule
from opacus_bpclip.rules.cancellation import kept


@dataclass(frozen=True)
class AffineRule(Rule):
    """The shared part: a subclass says over what its layer normalises.

    Attributes:
        eps: the layer's own, added to the variance.
    """

    eps: float | None

    @abstractmethod
    def normalized(self, x: Tensor) -> Tensor:
        """Return the input normalised as the layer does, without its affine map."""

    @abstractmethod
    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Return the input's gradient, and each example's own gradient, ``[B, K]``.

        ``dgamma_c = sum_p g_cp n_cp`` and ``dbeta_c = sum_p g_cp``, one after the other.

        Args:
            g: upstream gradient, of the input's shape.
            x: the input.
            weight: the layer's.
            wanted: whether the input's gradient is needed, the weight's, the bias's.
        """

    @abstractmethod
    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return the input's gradient alone.

        Args:
            g: as for `gradients`.
            x: as for `gradients`.
            weight: the layer's; ``None`` for ones.
        """

    def settled(self, dx: Tensor, of: Tensor, axes: tuple[int, ...], *, centre: bool) -> Tensor:
        """Return an input's gradient, in place, without what is nothing but rounding.

        It is what is left of the upstream gradient, times the weight, once its mean and its part
        along the normalised input are taken away.

        Args:
            dx: the gradient, from kernels that add up many numbers one by one.
            of: the norm of what it is left of, over ``axes``, which are kept with size 1.
            axes: over what the layer normalises.
            centre: whether the mean is one of what is taken away; it is taken again.
        """
        if centre:
            dx = dx.sub_(dx.mean(dim=axes, keepdim=True))
        left = torch.linalg.vector_norm(dx, dim=axes, keepdim=True)
        factor = kept(left, of, dx.dtype)
        # Reading a flag stalls an accelerator and breaks a traced graph: there, always multiply.
        if torch.compiler.is_compiling() or dx.device.type != "cpu" or bool((factor < 1).any()):
            dx = dx.mul_(factor)
        return dx

    @abstractmethod
    def centred(self, x: Tensor) -> Tensor:
        """Return the input less its means, which the layer is invariant to."""

    @abstractmethod
    def channels_first(self, x: Tensor) -> Tensor:
        """View ``[B, ...]`` as ``[B, C, P]``, a channel for each entry of the weight."""

    @abstractmethod
    def largest(self, x: Tensor) -> float:
        """Return the largest absolute value that normalisation can give for ``x``'s shape."""

    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Take the means away; there is nothing to clip, since the output's scale is fixed.

        A mean far larger than the deviations cancels badly in the layer's arithmetic, and rounding
        errors would stand in for normalised values that no bound knows. The means may count as
        constants: the layer's input gradient sums to zero over what it normalises.
        """
        (x,) = inputs
        assert x is not None
        centred = self.centred(x)
        flat = centred.flatten(1)
        largest = torch.linalg.vector_norm(flat, float("inf"), dim=1)
        # Beyond this the layer's sum of squares may overflow. Comparing with nan gives False.
        finite = largest < math.sqrt(torch.finfo(x.dtype).max / (4 * max(flat.shape[1], 1)))
        return Prepared((centred,), None, finite)

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Take the largest value that normalisation can give for every one."""
        upstream, _, rounded = self._upstream(g)
        largest = norms.max_column_norm(self.largest(g), weight=self.weight, bias=self.bias)
        return norms.product_bound(upstream[:, None], largest) * rounded

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Weight each entry by its column's norm."""
        upstream, slack, rounded = self._upstream(g)
        _, columns = self._columns(inputs, upstream.dtype)
        per_channel = (upstream.abs() * columns).sum(dim=2)
        return (torch.linalg.vector_norm(per_channel, dim=1) + slack) * rounded

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Make the gradient, and add what rounding may add to it."""
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
        """Return ``[B, C, P]``, what a norm of it may lose, and by what its sums may be too low."""
        dtype = precision.norm_dtype(g.dtype)
        upstream = self.channels_first(g).to(dtype)
        slack = norms.underflow(upstream.shape[1] * upstream.shape[2], dtype)
        return upstream, slack, norms.accumulation(upstream.shape[2], dtype)

    def _columns(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the normalised input and its columns' norms, ``[B, C, P]``."""
        (x,) = inputs
        assert x is not None
        value = self.channels_first(self.normalized(x)).to(dtype)
        return value, norms.column_norms(value.abs(), weight=self.weight, bias=self.bias)
