"""Backpropagation clipping for Opacus: DP-SGD that never holds a model's per-example gradients."""

from importlib.metadata import version

from opacus_bpclip.ab.comparing import compare
from opacus_bpclip.config import BackpropClipping
from opacus_bpclip.engine.engine import PrivacyEngine
from opacus_bpclip.engine.module import BackpropClipModule
from opacus_bpclip.engine.registration import register, unregister
from opacus_bpclip.errors import CoverageError, PrivacyViolationError
from opacus_bpclip.hooks import BackpropClipHooks
from opacus_bpclip.losses.criterion import BackpropClipCriterion
from opacus_bpclip.losses.losses import CrossEntropy
from opacus_bpclip.model.input_clipping import clip_inputs, unclip_inputs
from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
from opacus_bpclip.optimizer.several import SeveralOptimizers
from opacus_bpclip.rules import register_rule

__version__ = version("opacus-bpclip")

__all__ = [
    "BackpropClipCriterion",
    "BackpropClipHooks",
    "BackpropClipModule",
    "BackpropClipOptimizer",
    "BackpropClipping",
    "CoverageError",
    "CrossEntropy",
    "PrivacyEngine",
    "PrivacyViolationError",
    "SeveralOptimizers",
    "clip_inputs",
    "compare",
    "register",
    "register_rule",
    "unclip_inputs",
    "unregister",
]
