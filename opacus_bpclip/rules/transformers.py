"""Layers of Hugging Face's transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import nn
from typing_extensions import Self

from opacus_bpclip.rules.base import trainable
from opacus_bpclip.rules.linear import LinearRule


@dataclass(frozen=True)
class TransposedLinearRule(LinearRule):
    """``pytorch_utils.Conv1D``, of GPT-2: a linear layer whose weight is ``[in, out]``.

    Its gradient is the transpose of a linear layer's and has the same norm.
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
