"""Rules for layers that get several rows of each example: the views of one picture, for example.

The rows of an example are positions: the gradient of the layer is the sum over the rows, as it is
the sum over the positions of one row. So each bound on a sum over positions bounds the sum over all
positions of all rows. A tensor ``[B, K, ...]`` holds ``K`` rows of each example. Proof:
``docs/guarantee.md``, "Views".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.affine import AffineRule
from opacus_bpclip.rules.base import Rule, per_row
from opacus_bpclip.rules.broadcast import BroadcastRule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.embedding import EmbeddingRule
from opacus_bpclip.rules.functions import FunctionRule
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.group_norm import GroupNormRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.matrix import Measured
from opacus_bpclip.rules.normalization import LayerNormRule, RMSNormRule
from opacus_bpclip.rules.transformers import TransposedLinearRule


@dataclass(frozen=True)
class ConvOverViews(FusedRule):
    """A convolution: input ``[B, K, R * D', *spatial]``. Each row is clipped by itself.

    Attributes:
        one: the rule for one row of each example.
    """

    methods: ClassVar[tuple[str, ...]] = ConvRule.methods

    one: ConvRule

    @classmethod
    def of(cls, rule: ConvRule) -> Self:
        """Make the rule from that for single rows."""
        # The inner rule is asked for shapes and products, which do not depend on what is trainable.
        return cls(rule.weight, rule.bias, replace(rule, weight=False, bias=False))

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        return cls.of(ConvRule.from_module(module))

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept one axis more than a row has."""
        dims = 1 + self.one.expected_dims()[0]
        return dims, dims

    def batch_axis(self, default: int) -> int:
        """Return 0, as for single rows."""
        return self.one.batch_axis(default)

    def measure(self, x: Tensor) -> Measured:
        """Measure each patch of each row."""
        norms, total = self.one.measure(x.flatten(0, 1))
        return Measured(_joined(norms, x), total.view(x.shape[:2]).sum(dim=1))

    def clip_factor(self, norms: Tensor, max_norm: float, x: Tensor) -> Tensor:
        """Return one factor per row, repeated for its patches. ``[B, 1, K * P]``."""
        rows = norms.unflatten(2, (x.shape[1], -1))
        factor = (max_norm / rows.amax(dim=(1, 3), keepdim=True)).clamp(max=1)
        return factor.expand(-1, -1, -1, rows.shape[3]).flatten(2)

    def spread(self, factor: Tensor, x: Tensor) -> Tensor:
        """View the rows' factors so that they broadcast over the input."""
        rows = factor.unflatten(2, (x.shape[1], -1))[:, 0, :, 0]
        return rows.reshape(*x.shape[:2], *(1,) * (x.dim() - 2))

    def over_output(self, factor: Tensor, y: Tensor) -> Tensor:
        """View factors of examples or of rows so that they broadcast over the output."""
        return per_row(factor, y) if factor.shape[2] == 1 else self.spread(factor, y)

    def upstream(self, g: Tensor) -> Tensor:
        """View ``[B, K, R * C, *spatial]`` as ``[B, R, C, K * P]``."""
        return _joined(self.one.upstream(g.flatten(0, 1)), g)

    def columns(self, x: Tensor) -> Tensor:
        """Unfold the padded rows to ``[B, R, D, K * P]``."""
        return _joined(self.one.columns(x.flatten(0, 1)), x)

    def column_size(self) -> int:
        """Return the number of entries in a patch of one group."""
        return self.one.column_size()

    def is_closed(self) -> bool:
        """Return whether the convolution kernel pads itself."""
        return self.one.is_closed()

    def least_exact(self, dtype: torch.dtype) -> float:
        """Return 0 for several groups, as for single rows."""
        return 0.0 if self.one.groups > 1 else super().least_exact(dtype)

    def with_bias(self, y: Tensor, by: Tensor, bias: Tensor, out: Tensor | None) -> Tensor:
        """Return ``s y + (1 - s) b``."""
        return self.one.with_bias(y, by, bias, out)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Call the convolution's backward kernel on all rows."""
        g, rows = g.flatten(0, 1), x.flatten(0, 1)
        dx, dw = self.one.gradients(g, rows, weight, multiplier=multiplier, wanted=wanted)
        return None if dx is None else dx.view(x.shape), dw

    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Add up the gradients of each example's rows."""
        own = self.one.own_gradients(g.flatten(0, 1), x.flatten(0, 1), weight)
        return own.unflatten(0, g.shape[:2]).sum(dim=1)

    def own_bytes(self, g: Tensor, weight: Tensor) -> int:
        """Count the gradients of all rows."""
        return g.shape[1] * self.one.own_bytes(g.flatten(0, 1), weight)

    def bias_gradient(self, g: Tensor, factor: Tensor) -> Tensor:
        """Sum over the positions of all rows, then over the examples."""
        return factor @ g.flatten(3).sum(dim=(1, 3))


@dataclass(frozen=True)
class GroupNormOverViews(AffineRule):
    """A group or instance norm: input ``[B, K, C, *]``. Each row is normalised by itself.

    Attributes:
        one: the rule for one row of each example.
    """

    one: GroupNormRule

    @classmethod
    def of(cls, rule: GroupNormRule) -> Self:
        """Make the rule from that for single rows."""
        return cls(rule.weight, rule.bias, rule.eps, replace(rule, weight=False, bias=False))

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry.

        Raises:
            CoverageError: an instance norm keeps running statistics of the whole batch.
        """
        return cls.of(GroupNormRule.from_module(module))

    def expected_dims(self) -> tuple[int, int | None]:
        """Accept one axis more than a row has."""
        return 1 + self.one.expected_dims()[0], None

    def batch_axis(self, default: int) -> int:
        """Return 0, as for single rows."""
        return self.one.batch_axis(default)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalise over each group of each row."""
        return _by_rows(self.one.normalized, x)

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor]:
        """Add up the gradients of each example's rows."""
        dx, own = self.one.gradients(g.flatten(0, 1), x.flatten(0, 1), weight, wanted=wanted)
        return None if dx is None else dx.view(x.shape), own.unflatten(0, g.shape[:2]).sum(dim=1)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None) -> Tensor:
        """Call the layer's own backward kernel on all rows."""
        dx = self.one.input_gradient(g.flatten(0, 1), x.flatten(0, 1), weight)
        return dx.view(x.shape)

    def centred(self, x: Tensor) -> Tensor:
        """Subtract the mean over each group of each row."""
        return _by_rows(self.one.centred, x)

    def channels_first(self, x: Tensor) -> Tensor:
        """Join the rows' positions. ``[B, C, K * P]``."""
        return _joined(self.one.channels_first(x.flatten(0, 1)), x)

    def largest(self, x: Tensor) -> float:
        """Return the largest value in a row."""
        return self.one.largest(x.flatten(0, 1))


def over_views(rule: Rule) -> Rule | None:
    """Return the rule for ``[B, K, ...]`` of a layer with this rule for ``[B, ...]``.

    Rules for inputs with any number of axes of positions hold as they are. The functions that are
    called on broadcast parameters are followed, as those of a module without a rule. ``None`` for a
    rule that has no such form; then the functions that the layer calls are followed, too.

    Args:
        rule: the rule for one row of each example. A subclass may describe another layer.
    """
    if type(rule) in _WITH_POSITIONS:
        return rule
    if isinstance(rule, BroadcastRule):
        return FunctionRule.from_module(nn.Module())
    if type(rule) is ConvRule:
        return ConvOverViews.of(rule)
    return GroupNormOverViews.of(rule) if type(rule) is GroupNormRule else None


def of_one_row(rule: Rule) -> Rule:
    """Undo `over_views` for clipping inputs, to which it does not matter what is trainable."""
    return rule.one if isinstance(rule, ConvOverViews) else rule


_WITH_POSITIONS = (LinearRule, TransposedLinearRule, LayerNormRule, RMSNormRule, EmbeddingRule)


def _joined(rows: Tensor, like: Tensor) -> Tensor:
    """View ``[B * K, ..., P]`` as ``[B, ..., K * P]``, for ``like`` of shape ``[B, K, ...]``."""
    return rows.unflatten(0, like.shape[:2]).movedim(1, -2).flatten(-2)


def _by_rows(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return of(x.flatten(0, 1)).view(x.shape)
