"""The registry: which rule bounds which layer. A layer that is not here is refused."""

from __future__ import annotations

from torch import nn

from opacus_bpclip.rules.base import Keep, Prepared, Rule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.matrix import MatrixRule

RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
}

__all__ = ["RULES", "ConvRule", "Keep", "LinearRule", "MatrixRule", "Prepared", "Rule"]
