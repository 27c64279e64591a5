"""Audits: what a way of training does, measured against what it claims.

`audit` runs every check on a `Target`, and returns a `Verdict`. A target is one of the built-in
`CASES`, a model of yours (`model_target`), or any training code that is wrapped as a `Trainer`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_bpclip.audit.auditing import audit
    from opacus_bpclip.audit.cases import CASES, Case
    from opacus_bpclip.audit.engine_target import model_target
    from opacus_bpclip.audit.target import Batch, Target, Trainer
    from opacus_bpclip.audit.verdict import Verdict

__all__ = ["CASES", "Batch", "Case", "Target", "Trainer", "Verdict", "audit", "model_target"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line's parser needs none of it, nor torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in ("target", "verdict", "engine_target", "cases", "auditing"):
        module = import_module(f"{__name__}.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{name} has no home")
