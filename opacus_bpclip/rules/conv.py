"""Convolutions in one, two and three dimensions.

The columns are the unfolded patches of a group's channels, after padding. Patches overlap, so input
clipping scales a whole example by one factor. Proof: ``docs/rules/conv.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import norms as bounds
from opacus_bpclip.rules import precision
from opacus_bpclip.rules.base import per_row, trainable
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.matrix import Measured
from opacus_bpclip.rules.registry import register_rule

# CPU kernels are fast with at least this many channels in a group.
_BLOCK = 8


@register_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
@dataclass(frozen=True)
class ConvRule(FusedRule):
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
        """Read the layer's geometry; the paddings "same" and "valid" become numbers."""
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
        """Measure each patch: sum the pixels' squared norms over the patch.

        The sum along an axis is a product with the zeros and ones of `_windows`.
        """
        dtype = precision.norm_dtype(x.dtype)
        channels = x.unflatten(1, (self.groups, self.group_channels)).to(dtype)
        squared = channels.square()
        squared = squared[:, :, 0] if self.group_channels == 1 else squared.sum(dim=2)
        total = squared.flatten(1).sum(dim=1)
        # Padding with zeros adds nothing to a norm; other padding repeats parts of the input.
        zeros = self.padding_mode == "constant"
        make = _windows.__wrapped__ if torch.compiler.is_compiling() else _windows
        squared = squared if zeros else self._pad(squared)
        # The last axis first, so that every product reads memory in order.
        last = len(self.kernel) - 1
        for axis in range(last, -1, -1):
            pair = 2 * (last - axis)
            before, after = self.padding[pair : pair + 2] if zeros else (0, 0)
            reach = (self.kernel[axis], self.stride[axis], self.dilation[axis])
            size = squared.shape[2 + axis]
            windows = make(size, before, after, *reach, squared.dtype, squared.device)
            if axis == last:
                squared = torch.matmul(squared, windows)
            else:
                # The later axes have been summed already: flatten them into one.
                squared = torch.matmul(windows.T, squared.flatten(3 + axis))
        norms = squared.sqrt().flatten(2)
        return Measured(norms + 2 * bounds.underflow(self.column_size(), dtype), total)

    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Return one factor per example, which brings its largest patch down to ``max_norm``."""
        return (max_norm / norms.amax(dim=(1, 2), keepdim=True)).clamp(max=1)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the examples' factors so that they broadcast over the input."""
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
        """Return the number of entries in a patch of one group."""
        return self.group_channels * math.prod(self.kernel)

    def is_closed(self) -> bool:
        """Return whether the convolution kernel pads itself: zeros, as many on both sides."""
        return self.padding_mode == "constant" and self.padding[::2] == self.padding[1::2]

    def least_exact(self, dtype: torch.dtype) -> float:
        """Return 0 for several groups: `size` multiplies the norms of different groups."""
        return 0.0 if self.groups > 1 else super().least_exact(dtype)

    def over_output(self, factor: Tensor, y: Tensor) -> Tensor:
        """View the examples' factors so that they broadcast over the output."""
        return per_row(factor, y)

    def with_bias(self, y: Tensor, by: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        """Return ``s y + (1 - s) b``; ``torch.lerp`` is slower where the bias broadcasts."""
        shift = (1 - by) * bias.view(-1, *(1,) * len(self.kernel))
        return torch.mul(y, by, out=out).add_(shift)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Call the convolution's backward kernel."""
        dx, dw = self._backward(g, x, weight, self.groups, wanted)
        return dx, None if dw is None else dw * multiplier

    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the weight's gradient of each example by one grouped convolution.

        The batch is viewed as one example in which every example's channels are groups of their
        own. So the convolution's backward kernel does not add the examples up.
        """
        dtype = precision.norm_dtype(g.dtype)
        batch = g.shape[0]
        g, x = g.to(dtype), x.to(dtype)
        if not self._groups_are_fast(g):
            upstream, columns = self.upstream(g), self.columns(x)
            unfolded = torch.matmul(upstream, columns.transpose(-1, -2))
            return unfolded.view(batch, *weight.shape)
        _, own = self._backward(
            g.reshape(1, -1, *g.shape[2:]),
            x.reshape(1, -1, *x.shape[2:]),
            # The kernel reads the weight's shape only.
            x.new_empty(()).expand(batch * weight.shape[0], *weight.shape[1:]),
            batch * self.groups,
            (False, True),
        )
        assert own is not None
        return own.view(batch, *weight.shape)

    def _backward(
        self, g: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of input and weight from the convolution's kernel, if wanted."""
        dx, dw, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            self.stride,
            self.padding[::-2],
            self.dilation,
            False,
            (0,) * len(self.kernel),
            groups,
            (*wanted, False),
        )
        return dx, dw

    def own_bytes(self, g: Tensor, weight: Tensor) -> int:
        """Add the unfolded input where `own_gradients` builds it."""
        own = super().own_bytes(g, weight)
        if self._groups_are_fast(g):
            return own
        columns = self.groups * self.column_size() * g.shape[2:].numel()
        return own + columns * precision.norm_dtype(g.dtype).itemsize

    def _groups_are_fast(self, g: Tensor) -> bool:
        # On accelerators, kernels are slow with many groups. On a CPU, groups of few channels are
        # slow, but unfolding that a compiler has fused with the product is slower still.
        large = self.group_channels >= _BLOCK or torch.compiler.is_compiling()
        # A graph for batches of any size cannot have a variable number of groups.
        return g.device.type == "cpu" and large and isinstance(g.shape[0], int)

    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Sum over the positions, then over the examples."""
        return factor @ g.flatten(2).sum(dim=2)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, mode=self.padding_mode) if any(self.padding) else x


@lru_cache(maxsize=256)
def _windows(
    size: int,
    before: int,
    after: int,
    kernel: int,
    stride: int,
    dilation: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return ``[size, positions]``: 1 where a window along one axis covers an entry, else 0.

    Args:
        size: the size of the input along the axis.
        before: the padding before the input.
        after: the padding after the input.
        kernel: the number of entries in a window.
        stride: the distance from one window to the next.
        dilation: the distance from one entry of a window to the next.
        dtype: the dtype of the result.
        device: the device of the result.
    """
    reach = dilation * (kernel - 1) + 1
    positions = (size + before + after - reach) // stride + 1
    starts = torch.arange(positions, device=device) * stride - before
    offset = torch.arange(size, device=device)[:, None] - starts
    inside = (offset >= 0) & (offset < reach) & (offset % dilation == 0)
    return inside.to(dtype)
