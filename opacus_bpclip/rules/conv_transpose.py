"""Transposed convolutions in one, two and three dimensions.

Each input pixel is multiplied with the weight, and the result is added to a patch of the output. So
the columns are the pixels' channels, and the upstream gradients that meet them are unfolded patches
of the output's gradient. The bias is added at the positions of the output, so it is bounded apart
from the weight. Proof: ``docs/rules/conv_transpose.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules import exact_norms, precision
from opacus_bpclip.rules import norms as bounds
from opacus_bpclip.rules.base import Inputs, trainable
from opacus_bpclip.rules.matrix import MatrixRule, Measured
from opacus_bpclip.rules.registry import register_rule


@register_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
@dataclass(frozen=True)
class ConvTransposeRule(MatrixRule):
    """``nn.ConvTranspose1d``, ``2d``, ``3d``: input ``[B, R * D, *spatial]``.

    Attributes:
        output_bias: whether the layer has a trainable bias. `bias` is always False, since no entry
            of a column is the bias's constant 1.
    """

    output_bias: bool
    groups: int
    group_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry; the output's size shows how much padding was added to it."""
        layer = cast(nn.ConvTranspose2d, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=False,
            output_bias=trainable(layer, "bias"),
            groups=layer.groups,
            group_channels=layer.in_channels // layer.groups,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            padding=tuple(cast("tuple[int, ...]", layer.padding)),
        )

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept batched inputs only."""
        dims = 2 + len(self.kernel)
        return dims, dims

    def batch_axis(self, default: int) -> int:
        """Return 0: channels are on PyTorch's second axis, whatever the model's layout."""
        return 0

    def measure(self, x: Tensor) -> Measured:
        """Measure each pixel's channels, group by group."""
        dtype = precision.norm_dtype(x.dtype)
        norms = torch.linalg.vector_norm(self.columns(x), dim=2, dtype=dtype)
        norms = norms + bounds.underflow(self.group_channels, dtype)
        return Measured(norms, norms.sum(dim=(1, 2)))

    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Return one factor per pixel and group."""
        return (max_norm / norms).clamp(max=1)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """Repeat a group's factors for each of its channels."""
        of_groups = factor.view(x.shape[0], self.groups, *x.shape[2:])
        if self.groups == 1:
            return of_groups
        return of_groups.repeat_interleave(self.group_channels, dim=1)

    def upstream(self, g: Tensor) -> Tensor:
        """Unfold the output's gradient, as `_aligned` returns it, to ``[B, R, C * kernel, P]``."""
        windows = g
        for axis, (size, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True)
        ):
            windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)
            windows = windows[..., ::dilation]
        # [B, channels, *positions, *kernel] -> [B, R, C * kernel, P]
        spatial = len(self.kernel)
        positions = windows.shape[2 : 2 + spatial].numel()
        entries = g.shape[1] // self.groups * math.prod(self.kernel)
        order = (0, 1, *range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
        return windows.permute(order).reshape(g.shape[0], self.groups, entries, positions)

    def columns(self, x: Tensor) -> Tensor:
        """View the input as ``[B, R, D, P]``."""
        return x.reshape(x.shape[0], self.groups, self.group_channels, x.shape[2:].numel())

    def column_size(self) -> int:
        """Return the number of channels of a group."""
        return self.group_channels

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the product bound of weight and bias together."""
        of = super().product
        return self._joined(
            g, inputs, lambda g, rows: of(g, inputs, None, max_norm), self._sum_of_bias
        )

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the weighted bound of weight and bias together."""
        of, columns = super().weighted, input_norms
        assert columns is not None
        return self._joined(
            g, inputs, lambda g, rows: of(g, inputs, columns[rows]), self._sum_of_bias
        )

    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of the gradients of weight and bias together."""
        of, columns, (x,) = super().exact, input_norms, inputs
        assert x is not None
        assert columns is not None
        return self._joined(
            g, inputs, lambda g, rows: of(g, (x[rows],), columns[rows]), self._norm_of_bias
        )

    def _joined(
        self,
        g: Tensor,
        inputs: Inputs,
        of_weight: Callable[[Tensor, slice], Tensor],
        of_bias: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Combine the bounds of weight and bias: they are orthogonal, so the squares add up.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            of_weight: returns the weight's bound for some examples, given their `_aligned`
                gradients and the slice of the batch that they are.
            of_bias: returns the bias's bound, given ``g``.
        """
        parts = []
        if self.weight:
            (x,) = inputs
            assert x is not None
            aligned = self._aligned(g, x)
            positions = x.shape[2:].numel()
            entries = g.shape[1] // self.groups * math.prod(self.kernel)
            # A few examples at a time: unfolding repeats each gradient up to prod(kernel) times.
            needed = exact_norms.exact_bytes(
                positions, self.groups, entries, self.group_channels, g.dtype
            )
            chunk = exact_norms.exact_chunk(needed, g.device)
            parts.append(
                exact_norms.in_chunks(
                    g.shape[0], chunk, lambda rows: of_weight(aligned[rows], rows)
                )
            )
        if self.output_bias:
            parts.append(of_bias(g))
        return parts[0] if len(parts) == 1 else torch.hypot(*parts)

    def _sum_of_bias(self, g: Tensor) -> Tensor:
        """Return the bias's product bound; each of its columns is the constant 1."""
        channels = g.flatten(2)
        rounded = bounds.accumulation(channels.shape[2], precision.norm_dtype(g.dtype))
        return bounds.product_bound(channels.unsqueeze(1), 1.0) * rounded

    def _norm_of_bias(self, g: Tensor) -> Tensor:
        """Return the norm of the bias's gradient."""
        dtype = precision.norm_dtype(g.dtype)
        channels = g.flatten(2)
        # Positions may cancel in the sum, but their rounding errors do not.
        frobenius = torch.linalg.vector_norm(channels, dim=(1, 2), dtype=dtype)
        slack = precision.rounding_margin(g.dtype, g.device) * math.sqrt(channels.shape[2])
        norm = bounds.row_norms(channels.to(dtype).sum(dim=2)) + slack * frobenius
        return norm * bounds.accumulation(channels.shape[2], dtype)

    def _aligned(self, g: Tensor, x: Tensor) -> Tensor:
        """Pad or crop the output's gradient to the span of the input positions' windows."""
        pairs: list[int] = []
        for axis, before in reversed(list(enumerate(self.padding))):
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            needed = (x.shape[2 + axis] - 1) * self.stride[axis] + span
            pairs += [before, needed - before - g.shape[2 + axis]]
        return F.pad(g, pairs) if any(pairs) else g
