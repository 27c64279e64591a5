"""One rule a layer family: which norm of the input, which bound of the gradient, which proof."""

from opacus_bpclip.rules.base import Inputs, Keep, Prepared, Rule
from opacus_bpclip.rules.broadcast import BroadcastRule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.embedding import EmbeddingRule
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.matrix import MatrixRule
from opacus_bpclip.rules.normalization import (
    AffineRule,
    GroupNormRule,
    LayerNormRule,
    RMSNormRule,
)
from opacus_bpclip.rules.registry import RULES, register_rule, registered_kind, supported_layers

__all__ = [
    "RULES",
    "AffineRule",
    "BroadcastRule",
    "ConvRule",
    "EmbeddingRule",
    "FusedRule",
    "GroupNormRule",
    "Inputs",
    "Keep",
    "LayerNormRule",
    "LinearRule",
    "MatrixRule",
    "Prepared",
    "RMSNormRule",
    "Rule",
    "register_rule",
    "registered_kind",
    "supported_layers",
]
