"""LayerNorm and RMSNorm, which normalise over the last axes of each position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.affine import AffineRule
from opacus_bpclip.rules.base import trainable
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.LayerNorm)
@dataclass(frozen=True)
class LayerNormRule(AffineRule):
    """``nn.LayerNorm``: input ``[B, *, *shape]``, normalised over ``shape``."""

    subtracts_mean: ClassVar[bool] = True

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

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Normalise again, and sum over each example's positions."""
        normalized, dx = self.backward(g, x, weight, wanted=wanted[0])
        parts = []
        if wanted[1]:
            parts.append(self.channels_first(normalized.mul_(g)).sum(dim=2))
        if wanted[2]:
            parts.append(self.channels_first(g).sum(dim=2))
        return dx, torch.cat(parts, dim=1)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Normalise again, and call the layer's own backward kernel."""
        _, dx = self.backward(g, x, weight, wanted=True)
        assert dx is not None
        return dx

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the normalised input and the gradient of the input, by the layer's own kernels.

        Args:
            g: upstream gradient, of the input's shape.
            x: the layer's input, ``[B, ...]``.
            weight: the layer's weight; ``None`` for ones.
            wanted: whether the input's gradient is needed.
        """
        normalized, _, rstd = torch.ops.aten.native_layer_norm(x, self.shape, None, None, self.eps)
        if not wanted:
            return normalized, None
        # The kernel gets the normalised input. With the input itself, a large mean would cancel
        # and leave rounding errors: see `GroupNormRule._backward`.
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            g,
            normalized,
            self.shape,
            torch.zeros_like(rstd),
            torch.ones_like(rstd),
            weight,
            None,
            (True, False, False),
        )
        return normalized, self.without_rounding(dx, g, weight).mul_(rstd)

    def without_rounding(self, dx: Tensor, g: Tensor, weight: Tensor | None) -> Tensor:
        """Apply `suppress_rounding` to a gradient that is not divided by the deviation yet."""
        axes = self._axes()
        affine = g if weight is None else g * weight
        of = torch.linalg.vector_norm(affine, dim=axes, keepdim=True)
        return self.suppress_rounding(dx, of, axes, centre=self.subtracts_mean)

    def centred(self, x: Tensor) -> Tensor:
        """Subtract the mean over the last axes."""
        return x - x.mean(dim=self._axes(), keepdim=True)

    def channels_first(self, x: Tensor) -> Tensor:
        """View the normalised axes as channels, and the axes before them as positions."""
        size = math.prod(self.shape)
        positions = x.shape[1:].numel() // size
        return x.reshape(x.shape[0], positions, size).transpose(1, 2)

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N - 1)``, the value if one entry differs from all others."""
        return math.sqrt(max(math.prod(self.shape) - 1, 1))

    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.shape), 0))


@register_rule(nn.RMSNorm)
@dataclass(frozen=True)
class RMSNormRule(LayerNormRule):
    """``nn.RMSNorm``: like LayerNorm, without the mean and without a bias."""

    subtracts_mean: ClassVar[bool] = False

    def normalized(self, x: Tensor) -> Tensor:
        """Divide by the root mean square over the last axes."""
        return F.rms_norm(x, self.shape, eps=self.eps)

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, *, wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Divide by the root mean square, and differentiate that."""
        axes = self._axes()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        rstd = torch.rsqrt(x.square().mean(dim=axes, keepdim=True) + eps)
        normalized = x * rstd
        if not wanted:
            return normalized, None
        affine = g if weight is None else g * weight
        along = (affine * normalized).mean(dim=axes, keepdim=True)
        dx = affine - normalized * along
        return normalized, self.without_rounding(dx, g, weight).mul_(rstd)

    def centred(self, x: Tensor) -> Tensor:
        """Return the input: the layer subtracts no mean."""
        return x

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N)``, which is reached if only one of ``N`` entries is not 0."""
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
