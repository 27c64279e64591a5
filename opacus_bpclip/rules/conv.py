"""Convolutions in one, two and three dimensions.

Columns are the unfolded patches of a group's channels, after padding. Patches overlap, so one
factor scales the whole example. Proof: ``docs/rules/conv.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip import norms as bounds
from opacus_bpclip.rules.base import per_row, trainable
from opacus_bpclip.rules.matrix import MatrixRule, Measured


@dataclass(frozen=True)
class ConvRule(MatrixRule):
    """``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``: input ``[B, R * D', *spatial]``."""

    methods: ClassVar[tuple[str, ...]] = ("forward", "_conv_forward")

    groups: int
    group_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]  # as F.pad takes it: last axis first, a pair per axis
    padding_mode: str

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry; "same" and "valid" become numbers."""
        layer = cast(nn.Conv2d, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=trainable(layer, "bias"),
            groups=layer.groups,
            group_channels=layer.in_channels // layer.groups,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            padding=tuple(layer._reversed_padding_repeated_twice),
            padding_mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept batched inputs only."""
        dims = 2 + len(self.kernel)
        return dims, dims

    def batch_axis(self, default: int) -> int:
        """Return 0: channels are on PyTorch's second axis, whatever the model's layout."""
        return 0

    def measure(self, x: Tensor) -> Measured:
        """Measure each patch by a box filter over the squared norms of the pixels."""
        dtype = bounds.norm_dtype(x.dtype)
        channels = x.unflatten(1, (self.groups, self.group_channels))
        pixels = channels.to(dtype).square().sum(dim=2)
        finite = pixels.isfinite().flatten(1).all(dim=1)
        squared = self._pad(pixels)
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            # A sum over windows, not a convolution with ones: that one may run in lower precision.
            windows = squared.unfold(2 + axis, dilation * (size - 1) + 1, stride)
            squared = windows[..., ::dilation].sum(dim=-1)
        norms = squared.sqrt().flatten(2)
        return Measured(norms + 2 * bounds.underflow(self.column_size(), dtype), finite)

    def clip_factor(self, norms: Tensor, max_norm: float) -> Tensor:
        """Clip the example by its largest patch."""
        return (max_norm / norms.amax(dim=(1, 2), keepdim=True)).clamp(max=1)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """Give each example its factor."""
        return per_row(factor, x)

    def upstream(self, g: Tensor) -> Tensor:
        """View ``[B, R * C, *spatial]`` as ``[B, R, C, P]``."""
        positions = g.shape[2:].numel()
        return g.reshape(g.shape[0], self.groups, g.shape[1] // self.groups, positions)

    def columns(self, x: Tensor) -> Tensor:
        """Unfold the padded input to ``[B, R, D, P]``."""
        windows = self._pad(x)
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)
            windows = windows[..., ::dilation]
        # [B, channels, *positions, *kernel] -> [B, R, D, P]
        spatial = len(self.kernel)
        batch, positions = x.shape[0], windows.shape[2 : 2 + spatial].numel()
        order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
        return windows.permute(order).reshape(batch, self.groups, self.column_size(), positions)

    def column_size(self) -> int:
        """Return the number of inputs of one patch of one group."""
        return self.group_channels * math.prod(self.kernel)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, mode=self.padding_mode) if any(self.padding) else x
