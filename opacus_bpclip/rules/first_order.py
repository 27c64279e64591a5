"""Backward functions that refuse to be differentiated, with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from opacus_bpclip.errors import PrivacyViolationError
from opacus_bpclip.rules.precision import full_precision

Backward = Callable[..., Any]

_PROBLEM = (
    "A gradient was taken with create_graph=True through a layer that clips (a gradient penalty, "
    "as in WGAN-GP or R1, or a second-order optimizer). A loss computed from that gradient has "
    "gradients that no rule bounds, so they would not be private. Leave the penalty out of the "
    "loss; the optimizer's weight_decay keeps a model's slope small, too."
)


def first_order(backward: Backward) -> Backward:
    """Decorate the backward function of a clipping node so that it records no graph.

    Raises:
        PrivacyViolationError: raised by the decorated function if ``create_graph=True``.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            raise PrivacyViolationError(_PROBLEM)
        # The user may call backward under autocast.
        with full_precision():
            return once(ctx, *gradients)

    return checked
