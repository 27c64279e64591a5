"""Running statistics, which a pass without gradients must not take up from private examples.

They have no noise, and later passes use them. A pass with gradients is refused elsewhere: there the
batch's own statistics make examples influence each other.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from opacus_bpclip.errors import PrivacyViolationError


def watch_statistics(model: nn.Module) -> list[RemovableHandle]:
    """Let a model's normalisations refuse to take up statistics where no gradients are made.

    The hooks are the normalisations' own, since parts of a model may be called by themselves.
    """
    return [
        norm.register_forward_pre_hook(partial(_require_unchanged, name or "(root)"))
        for name, norm in model.named_modules()
        if isinstance(norm, _NormBase)
    ]


def _require_unchanged(name: str, norm: Any, _: object) -> None:
    if torch.is_grad_enabled() or not norm.training or norm.running_mean is None:
        return
    if norm.momentum == 0:
        return
    raise PrivacyViolationError(
        f"{name} is in training mode, so that a pass without gradients, too, changes its running "
        "statistics. They have no noise, and later passes use them. Call model.eval() before such "
        f"a pass, or keep {name} in evaluation mode. To take up statistics of public examples, do "
        "it before make_private."
    )
