"""GroupNorm and InstanceNorm, which normalise over groups of channels and all positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.errors import CoverageError
from opacus_bpclip.rules.affine import AffineRule
from opacus_bpclip.rules.base import trainable
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
@dataclass(frozen=True)
class GroupNormRule(AffineRule):
    """``nn.GroupNorm`` and ``nn.InstanceNorm1d/2d/3d``: input ``[B, C, *]``.

    Each normalises over a group's channels and all positions; for an instance norm, a group is one
    channel.
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
                    "track_running_stats=True keeps statistics over the examples of a batch, which "
                    "are released without noise. Use track_running_stats=False."
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
        """Accept any number of axes of positions."""
        return self.smallest_dims, None

    def batch_axis(self, default: int) -> int:
        """Return 0: channels are on PyTorch's second axis, whatever the model's layout."""
        return 0

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over each group."""
        assert self.eps is not None
        return F.group_norm(x, self.groups, eps=self.eps)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Concatenate the per-example gradients of weight and bias."""
        dx, *parts = self._backward(g, x, weight, wanted)
        return dx, torch.cat([part for part in parts if part is not None], dim=1)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Normalise again, and call the layer's own backward kernel."""
        if weight is None:
            weight = x.new_ones(self.channels)
        dx, _, _ = self._backward(g, x, weight, (True, False, False))
        assert dx is not None
        return dx

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Compute all gradients by one call of the layer's backward kernel.

        The kernel sums the gradients of weight and bias over the batch. So the batch is viewed as
        one example in which every example's channels are separate: nothing is summed, and the
        per-example gradients cost as much as the sum would.

        The kernel gets the normalised input, of mean 0 and deviation 1. With the input itself,
        ``sum_p g_p x_p - mean * sum_p g_p`` would cancel for a large mean and leave rounding
        errors, which change with the batch's private size if the loss is a mean.

        Returns:
            The gradient of the input, and the per-example gradients of weight and bias, each
            ``[B, C]``; ``None`` if not wanted.
        """
        batch, positions = x.shape[0], x.shape[2:].numel()
        if not batch:
            empty = (
                torch.zeros_like(x),
                x.new_zeros(0, self.channels),
                x.new_zeros(0, self.channels),
            )
            return tuple(part if want else None for part, want in zip(empty, wanted, strict=True))
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            return self._channel_by_channel(g, x, weight, wanted)
        x, g = x.contiguous(), g.contiguous()
        normalized, _, rstd = torch.ops.aten.native_group_norm(
            x, None, None, batch, self.channels, positions, self.groups, self.eps
        )
        flat = (1, batch * self.channels, positions)
        deviation = torch.ones(1, batch * self.groups, dtype=rstd.dtype, device=rstd.device)
        # All channels of a group share the deviation, so it can be multiplied into the weight.
        scaled = rstd.view(batch, self.groups, 1) * weight.view(self.groups, -1)
        dx, *parts = torch.ops.aten.native_group_norm_backward(
            g.view(flat),
            normalized.view(flat),
            torch.zeros_like(deviation),
            deviation,
            scaled.view(-1),
            *flat,
            batch * self.groups,
            wanted,
        )
        own = (None if part is None else part.view(batch, -1) for part in parts)
        if dx is not None:
            dx = self._without_rounding(dx, g, scaled)
        return None if dx is None else dx.view(x.shape), *own

    def _without_rounding(self, dx: Tensor, g: Tensor, scaled: Tensor) -> Tensor:
        """Apply `suppress_rounding` to each group; return ``[B, R, *]``.

        Args:
            dx: the gradient of the input, in any shape.
            g: the upstream gradient.
            scaled: ``[B, R, *]``, the number that each channel was multiplied by.
        """
        channels = torch.linalg.vector_norm(self.channels_first(g), dim=2)
        of = torch.linalg.vector_norm(channels.view(scaled.shape) * scaled, dim=2, keepdim=True)
        return self.suppress_rounding(dx.view(g.shape[0], self.groups, -1), of, (2,), centre=True)

    def _channel_by_channel(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Return `_backward` in elementary operations, which suits compiled CPU code.

        With ``h = gamma g``: ``dx = (h - mean(h) - n mean(h n)) / deviation``, over each group.
        A product with a matrix of zeros and ones repeats a group's numbers for its channels. The
        compiler does not fuse this product into the loops over positions, so these read one number
        per channel.
        """
        batch, positions = x.shape[0], x.shape[2:].numel()
        _, mean, rstd = torch.ops.aten.native_group_norm(
            x, None, None, batch, self.channels, positions, self.groups, self.eps
        )
        size = self.channels // self.groups
        groups = torch.arange(self.groups, device=x.device)
        spread = (groups[:, None] == groups.repeat_interleave(size)).to(rstd.dtype)  # [R, C]
        centre, scale = mean @ spread, rstd @ spread  # [B, C]
        average = spread.T @ spread / (size * positions)
        g = self.channels_first(g)
        normalized = (self.channels_first(x) - centre[..., None]) * scale[..., None]
        own = (g * normalized).sum(dim=2), g.sum(dim=2)
        along, shift = ((sums * weight * scale) @ average for sums in own)
        scale = weight * scale
        dx = g * scale[..., None] - normalized * along[..., None] - shift[..., None]
        dx = self._without_rounding(dx, g, scale.view(batch, self.groups, -1))
        parts = (dx.view(x.shape), *own)
        return tuple(part if want else None for part, want in zip(parts, wanted, strict=True))

    def centred(self, x: Tensor) -> Tensor:
        """Subtract the mean over each group."""
        grouped = x.unflatten(1, (self.groups, -1))
        mean = grouped.mean(dim=tuple(range(2, grouped.dim())), keepdim=True)
        return (grouped - mean).reshape(x.shape)

    def channels_first(self, x: Tensor) -> Tensor:
        """Flatten the positions."""
        return x.reshape(x.shape[0], self.channels, x.shape[2:].numel())

    def largest(self, x: Tensor) -> float:
        """Return ``sqrt(N - 1)``, the value if one entry differs from all others."""
        count = self.channels // self.groups * x.shape[2:].numel()
        return math.sqrt(max(count - 1, 1))
