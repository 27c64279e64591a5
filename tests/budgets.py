"""Options for the two budgets."""

from __future__ import annotations

from typing import Any

from opacus_bpclip import BackpropClipping


def layerwise(**options: Any) -> BackpropClipping:
    """Options for a budget of each layer's own, with clipped inputs; each use is declared."""
    defaults = {
        "allocation": "dimension",
        "bound": "weighted",
        "max_input_norm": 3.0,
        "uses": {},
    }
    return BackpropClipping(**{**defaults, **options})
