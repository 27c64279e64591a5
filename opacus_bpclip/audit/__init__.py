"""Audits: what a way of training does, measured against what it claims.

`audit` runs every check on a `Target`, and returns a `Verdict`. A target is one of the built-in
`CASES`, a model of one's own (`model_target`), or any training code that is wrapped as a `Trainer`.
"""

from opacus_bpclip.audit.auditing import audit
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
    "model_target",
]
