"""Backpropagation clipping for Opacus: DP-SGD that never holds a model's per-example gradients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_bpclip.ab.comparing import compare
    from opacus_bpclip.config import (
        AdaptiveThreshold,
        BackpropClipping,
        InputWhitening,
        PinkNoise,
        ThresholdSchedule,
    )
    from opacus_bpclip.engine.engine import PrivacyEngine
    from opacus_bpclip.engine.module import BackpropClipModule
    from opacus_bpclip.engine.registration import register, unregister
    from opacus_bpclip.errors import CoverageError, PrivacyViolationError
    from opacus_bpclip.hooks import BackpropClipHooks
    from opacus_bpclip.losses.criterion import BackpropClipCriterion
    from opacus_bpclip.losses.losses import CrossEntropy
    from opacus_bpclip.model.input_clipping import clip_inputs, unclip_inputs
    from opacus_bpclip.model.views import FoldViews
    from opacus_bpclip.optimizer.optimizer import BackpropClipOptimizer
    from opacus_bpclip.optimizer.several import SeveralOptimizers
    from opacus_bpclip.rules import register_rule
    from opacus_bpclip.sampling.views import AugmentedViews

    __version__: str

__all__ = [
    "AdaptiveThreshold",
    "AugmentedViews",
    "BackpropClipCriterion",
    "BackpropClipHooks",
    "BackpropClipModule",
    "BackpropClipOptimizer",
    "BackpropClipping",
    "CoverageError",
    "CrossEntropy",
    "FoldViews",
    "InputWhitening",
    "PinkNoise",
    "PrivacyEngine",
    "PrivacyViolationError",
    "SeveralOptimizers",
    "ThresholdSchedule",
    "clip_inputs",
    "compare",
    "register",
    "register_rule",
    "unclip_inputs",
    "unregister",
]

_HOMES = {
    "AdaptiveThreshold": "config",
    "AugmentedViews": "sampling.views",
    "BackpropClipCriterion": "losses.criterion",
    "BackpropClipHooks": "hooks",
    "BackpropClipModule": "engine.module",
    "BackpropClipOptimizer": "optimizer.optimizer",
    "BackpropClipping": "config",
    "CoverageError": "errors",
    "CrossEntropy": "losses.losses",
    "FoldViews": "model.views",
    "InputWhitening": "config",
    "PinkNoise": "config",
    "PrivacyEngine": "engine.engine",
    "PrivacyViolationError": "errors",
    "SeveralOptimizers": "optimizer.several",
    "ThresholdSchedule": "config",
    "clip_inputs": "model.input_clipping",
    "compare": "ab.comparing",
    "register": "engine.registration",
    "register_rule": "rules",
    "unclip_inputs": "model.input_clipping",
    "unregister": "engine.registration",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `opacus-bpclip --help` need not wait for torch.
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("opacus-bpclip")
    elif name in _HOMES:
        found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
