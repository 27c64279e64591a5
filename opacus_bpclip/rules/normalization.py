"""Normalisation within one example, followed by an affine map: LayerNorm, RMSNorm, GroupNorm, ...

The normalisation has no parameters; the affine map's gradient is diagonal. With ``n`` the
normalised value, ``dgamma_c = sum_p g_cp n_cp`` and ``dbeta_c = sum_p g_cp``: each channel has the
columns ``(n_cp, 1)``. Proof: ``docs/rules/normalization.md``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip import norms
from opacus_bpclip.errors import CoverageError
from opacus_bpclip.rules.base import Inputs, Keep, Prepared, Rule, trainable


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
    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the normalised input, and the input's gradient, by the layer's own kernels.

        Args:
            g: upstream gradient, of the input's shape.
            x: the input.
            weight: the layer's.
            wanted: whether the input's gradient is needed.
        """

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
        normalized, dx = self.backward(g, x, weight, wanted=wanted[0])
        parts = []
        if wanted[1]:
            parts.append(self.channels_first(normalized.mul_(g)).sum(dim=2))
        if wanted[2]:
            parts.append(self.channels_first(g).sum(dim=2))
        return dx, parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def keeps(self, kind: str) -> Keep:
        """Keep the input, as the layer does, but for the product bound."""
        return Keep(inputs=kind != "product", norms=False)

    def bound(
        self,
        kind: str,
        g: Tensor,
        inputs: Inputs,
        input_norms: Tensor | None,
        max_norm: float | None,
    ) -> Tensor:
        """Return the bound of this kind."""
        dtype = norms.norm_dtype(g.dtype)
        upstream = self.channels_first(g).to(dtype)
        slack = norms.underflow(upstream.shape[1] * upstream.shape[2], dtype)
        rounded = norms.accumulation(upstream.shape[2], dtype)
        if kind == "product":
            largest = norms.max_column_norm(self.largest(g), weight=self.weight, bias=self.bias)
            return norms.product_bound(upstream[:, None], largest) * rounded
        (x,) = inputs
        assert x is not None
        value = self.channels_first(self.normalized(x)).to(dtype)
        columns = norms.column_norms(value.abs(), weight=self.weight, bias=self.bias)
        if kind == "weighted":
            per_channel = (upstream.abs() * columns).sum(dim=2)
            return (torch.linalg.vector_norm(per_channel, dim=1) + slack) * rounded
        parts = []
        if self.weight:
            parts.append((upstream * value).sum(dim=2))
        if self.bias:
            parts.append(upstream.sum(dim=2))
        exact = torch.linalg.vector_norm(torch.cat(parts, dim=1), dim=1)
        frobenius = torch.linalg.vector_norm(upstream, dim=(1, 2)) * torch.linalg.vector_norm(
            columns, dim=(1, 2)
        )
        return (exact + norms.rounding_margin(g.dtype, g.device) * frobenius + slack) * rounded


@dataclass(frozen=True)
class LayerNormRule(AffineRule):
    """``nn.LayerNorm``: input ``[B, *, *shape]``, normalised over ``shape``."""

    shape: tuple[int, ...]

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        layer = cast(nn.LayerNorm, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=trainable(layer, "bias"),
            eps=layer.eps,
            shape=tuple(layer.normalized_shape),
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept any number of axes between the batch and the normalised ones."""
        return 1 + len(self.shape), None

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over the last axes."""
        assert self.eps is not None
        return F.layer_norm(x, self.shape, eps=self.eps)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Normalise over the last axes, and back."""
        normalized, mean, rstd = torch.ops.aten.native_layer_norm(
            x, self.shape, None, None, self.eps
        )
        if not wanted:
            return normalized, None
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, self.shape, mean, rstd, weight, None, (True, False, False)
        )
        return normalized, dx

    def centred(self, x: Tensor) -> Tensor:
        """Take the mean over the last axes away."""
        return x - x.mean(dim=self._axes(), keepdim=True)

    def channels_first(self, x: Tensor) -> Tensor:
        """Every normalised entry is a channel, every axis before a position."""
        size = math.prod(self.shape)
        positions = x.shape[1:].numel() // size
        return x.reshape(x.shape[0], positions, size).transpose(1, 2)

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N - 1)``: one entry holds the whole deviation of ``N``."""
        return math.sqrt(max(math.prod(self.shape) - 1, 1))

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.shape), 0))


@dataclass(frozen=True)
class RMSNormRule(LayerNormRule):
    """``nn.RMSNorm``: as LayerNorm, without the mean and without a bias."""

    def normalized(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the last axes."""
        return F.rms_norm(x, self.shape, eps=self.eps)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Divide by the root mean square, and back."""
        axes = self._axes()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rstd = torch.rsqrt(x.square().mean(dim=axes, keepdim=True) + eps)
        normalized = x * rstd
        if not wanted:
            return normalized, None
        affine = g * weight
        along = (affine * normalized).mean(dim=axes, keepdim=True)
        return normalized, (affine - normalized * along).mul_(rstd)

    def centred(self, x: Tensor) -> Tensor:
        """Return the input: no mean is involved."""
        return x

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N)``: one entry holds the whole mean square of ``N``."""
        return math.sqrt(math.prod(self.shape))

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        layer = cast(nn.RMSNorm, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=False,
            eps=layer.eps,
            shape=tuple(layer.normalized_shape),
        )


@dataclass(frozen=True)
class GroupNormRule(AffineRule):
    """``nn.GroupNorm`` and ``nn.InstanceNorm1d/2d/3d``: input ``[B, C, *]``.

    Normalised over a group's channels and all positions; an instance norm's groups are channels.
    """

    groups: int
    channels: int
    smallest_dims: int

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry.

        Raises:
            CoverageError: an instance norm keeps running statistics of the whole batch.
        """
        if isinstance(module, nn.GroupNorm):
            groups, channels, smallest_dims = module.num_groups, module.num_channels, 2
        else:
            layer = cast(nn.InstanceNorm2d, module)
            if layer.track_running_stats:
                raise CoverageError(
                    "track_running_stats=True collects statistics over the examples of the batch. "
                    "Use track_running_stats=False."
                )
            groups = channels = layer.num_features
            smallest_dims = 3
        return cls(
            weight=trainable(module, "weight"),
            bias=trainable(module, "bias"),
            eps=cast(nn.GroupNorm, module).eps,
            groups=groups,
            channels=channels,
            smallest_dims=smallest_dims,
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept any number of positions' axes."""
        return self.smallest_dims, None

    def batch_axis(self, default: int) -> int:
        """Return 0: channels are on PyTorch's second axis, whatever the model's layout."""
        return 0

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over each group."""
        assert self.eps is not None
        return F.group_norm(x, self.groups, eps=self.eps)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Normalise over each group, and back."""
        x, g = x.contiguous(), g.contiguous()
        sizes = (x.shape[0], self.channels, x.shape[2:].numel(), self.groups)
        normalized, mean, rstd = torch.ops.aten.native_group_norm(x, None, None, *sizes, self.eps)
        if not wanted:
            return normalized, None
        dx, _, _ = torch.ops.aten.native_group_norm_backward(
            g, x, mean, rstd, weight, *sizes, (True, False, False)
        )
        return normalized, dx

    def centred(self, x: Tensor) -> Tensor:
        """Take the mean over each group away."""
        grouped = x.unflatten(1, (self.groups, -1))
        mean = grouped.mean(dim=tuple(range(2, grouped.dim())), keepdim=True)
        return (grouped - mean).reshape(x.shape)

    def channels_first(self, x: Tensor) -> Tensor:
        """Flatten the positions."""
        return x.reshape(x.shape[0], self.channels, x.shape[2:].numel())

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N - 1)``: one entry holds the whole deviation of ``N``."""
        count = self.channels // self.groups * x.shape[2:].numel()
        return math.sqrt(max(count - 1, 1))
