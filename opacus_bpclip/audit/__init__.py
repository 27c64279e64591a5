"""Audits: what a way of training does, measured against what it claims.

``audit(target)`` runs every check on anything that can be wrapped as a `Target`, ``audit_case`` on
one of the built-in `CASES`, and `model_target` wraps a model of one's own. Audits return a
`Verdict`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_bpclip.audit.auditing import audit, audit_case
    from opacus_bpclip.audit.cases import CASES, Case
    from opacus_bpclip.audit.target import Batch, Target, Trainer
    from opacus_bpclip.audit.user_target import model_target
    from opacus_bpclip.audit.verdict import Verdict

__all__ = [
    "CASES",
    "Batch",
    "Case",
    "Target",
    "Trainer",
    "Verdict",
    "audit",
    "audit_case",
    "model_target",
]

_HOMES = {
    "audit": "auditing",
    "audit_case": "auditing",
    "CASES": "cases",
    "Case": "cases",
    "Batch": "target",
    "Target": "target",
    "Trainer": "target",
    "model_target": "user_target",
    "Verdict": "verdict",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line's parser needs none of it, nor torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
