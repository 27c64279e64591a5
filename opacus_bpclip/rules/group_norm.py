"""GroupNorm and InstanceNorm: normalised over groups of channels and all positions."""

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

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Put together what the kernel makes of each example's channels."""
        dx, *parts = self._backward(g, x, weight, wanted)
        return dx, torch.cat([part for part in parts if part is not None], dim=1)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Normalise again, and take the layer's own kernel."""
        if weight is None:
            weight = x.new_ones(self.channels)
        dx, _, _ = self._backward(g, x, weight, (True, False, False))
        assert dx is not None
        return dx

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Take each example's channels for channels of their own, of one single example.

        The layer's kernel adds up over examples what it has made for each of their channels; here
        it has nothing to add, and tells the examples apart at the price of the sum.

        It gets the normalised input, of mean 0 and deviation 1, not the input: ``sum_p g_p x_p``
        less ``mean sum_p g_p`` would cancel for a large mean, into rounding errors that change
        with the size of a mean loss's batch.

        Returns:
            The gradient of the input, and each example's of weight and bias, ``[B, C]``; ``None``
            for what is not wanted.
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
        # The deviation is the same for all channels of a group: as well a part of the weight.
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
        """Return `settled` for ``[B, R, *]``.

        Args:
            dx: the gradient of the input, in any shape.
            g: the upstream gradient.
            scaled: ``[B, R, *]``, what each channel was multiplied by.
        """
        channels = torch.linalg.vector_norm(self.channels_first(g), dim=2)
        of = torch.linalg.vector_norm(channels.view(scaled.shape) * scaled, dim=2, keepdim=True)
        return self.settled(dx.view(g.shape[0], self.groups, -1), of, (2,), centre=True)

    def _channel_by_channel(
        self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, ...]:
        """Return `_backward` by the textbook, for a compiler that has the channels last.

        With ``h = gamma g``: ``dx = (h - mean(h) - n mean(h n)) / deviation``, over each group.
        What belongs to a group is spread over its channels by a product with zeros and ones, which
        no compiler takes apart: loops over positions and channels then read one number a channel.
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
