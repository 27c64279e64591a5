"""The registry: which rule bounds which layer. A layer that is not here is refused."""

from __future__ import annotations

from torch import nn

from opacus_bpclip.rules.base import Keep, Prepared, Rule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.embedding import EmbeddingRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.matrix import MatrixRule
from opacus_bpclip.rules.normalization import (
    AffineRule,
    GroupNormRule,
    LayerNormRule,
    RMSNormRule,
)

RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.InstanceNorm1d: GroupNormRule,
    nn.InstanceNorm2d: GroupNormRule,
    nn.InstanceNorm3d: GroupNormRule,
}

__all__ = [
    "RULES",
    "AffineRule",
    "ConvRule",
    "EmbeddingRule",
    "GroupNormRule",
    "Keep",
    "LayerNormRule",
    "LinearRule",
    "MatrixRule",
    "Prepared",
    "RMSNormRule",
    "Rule",
]
