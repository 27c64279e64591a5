"""Rules: for each family of layers, the closed forms that bound an example's gradient."""

from importlib import import_module
from pkgutil import iter_modules

from opacus_bpclip.rules.affine import AffineRule
from opacus_bpclip.rules.base import Inputs, Prepared, Rule
from opacus_bpclip.rules.bilinear import BilinearRule
from opacus_bpclip.rules.bounds import Bound, bound_of
from opacus_bpclip.rules.broadcast import BroadcastRule
from opacus_bpclip.rules.conv import ConvRule
from opacus_bpclip.rules.conv_transpose import ConvTransposeRule
from opacus_bpclip.rules.embedding import EmbeddingRule
from opacus_bpclip.rules.embedding_bag import EmbeddingBagRule
from opacus_bpclip.rules.functions import FunctionRule
from opacus_bpclip.rules.fused import FusedRule
from opacus_bpclip.rules.group_norm import GroupNormRule
from opacus_bpclip.rules.linear import LinearRule
from opacus_bpclip.rules.matrix import MatrixRule
from opacus_bpclip.rules.normalization import LayerNormRule, RMSNormRule
from opacus_bpclip.rules.prelu import PReLURule
from opacus_bpclip.rules.registry import RULES, register_rule, registered_kind
from opacus_bpclip.rules.sequence_bias import SequenceBiasRule
from opacus_bpclip.rules.transformers import TransposedLinearRule

# A file registers its rules when it is imported, so that a new rule needs no entry elsewhere.
for _file in iter_modules(__path__, f"{__name__}."):
    import_module(_file.name)

__all__ = [
    "RULES",
    "AffineRule",
    "BilinearRule",
    "Bound",
    "BroadcastRule",
    "ConvRule",
    "ConvTransposeRule",
    "EmbeddingBagRule",
    "EmbeddingRule",
    "FunctionRule",
    "FusedRule",
    "GroupNormRule",
    "Inputs",
    "LayerNormRule",
    "LinearRule",
    "MatrixRule",
    "PReLURule",
    "Prepared",
    "RMSNormRule",
    "Rule",
    "SequenceBiasRule",
    "TransposedLinearRule",
    "bound_of",
    "register_rule",
    "registered_kind",
]
