"""Rules for layers of Hugging Face's transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.base import trainable
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.registry import register_rule


@register_rule("transformers.pytorch_utils.Conv1D")
@dataclass(frozen=True)
class TransposedLinearRule(LinearRule):
    """``pytorch_utils.Conv1D``, used by GPT-2: a linear layer whose weight is ``[in, out]``.

    Its gradient is the transpose of a linear layer's gradient, so it has the same norm.
    """

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Read the layer's geometry."""
        in_features, _ = cast(nn.Linear, module).weight.shape
        return cls(
            weight=trainable(module, "weight"),
            bias=trainable(module, "bias"),
            in_features=in_features,
        )

    def gradients(
        self, g: Tensor, x: Tensor, weight: Tensor, *, multiplier: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the linear layer's gradients, the weight's transposed."""
        dx, dw = super().gradients(g, x, weight.T, multiplier=multiplier, wanted=wanted)
        return dx, None if dw is None else dw.T.contiguous()

    def own_gradients(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply each example's input with its upstream gradient."""
        return super().own_gradients(x, g, weight.T)

    def oriented(self, upstream: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return the columns first, since they are the rows of the weight."""
        return columns, upstream
