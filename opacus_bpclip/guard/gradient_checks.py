"""What may be wrong with a gradient that arrives at its parameter: a sentence with the remedy.

`GradientGuard.require` turns a sentence into a refusal.
"""

from __future__ import annotations

from torch import Tensor

from opacus_bpclip.guard.passes import ACCUMULATION, TWO_FORWARDS
from opacus_bpclip.guard.provenance import WatchedParameter
from opacus_bpclip.model.coverage import TRAINABLE_DTYPES

_THROUGH_ITS_LAYER = (
    "Use the parameter through its layer only, not directly as F.linear(x, layer.weight) does. In "
    "place of a penalty on the weights in the loss, give the optimizer weight_decay, or shrink the "
    "weights after its step"
)


def wrong_gradient(
    watched: WatchedParameter, gradient: Tensor, *, compiled: bool, alone: bool, several: bool
) -> str | None:
    """Say why a gradient cannot be accounted for, ``None`` if it can.

    Args:
        watched: the parameter.
        gradient: what is about to reach it.
        compiled: whether part of the forward pass was traced, and so unseen.
        alone: whether the step is to be of one batch.
        several: whether the gradients at hand came from several forward passes.
    """
    if gradient.dtype not in TRAINABLE_DTYPES:
        return _lower_precision(watched.name, gradient)
    if not watched.sent:
        if not (compiled and watched.vouched):
            return _of_unknown_origin(watched.name, compiled)
    elif not watched.is_sum_of_sent(gradient):
        if several and not watched.passes:
            return TWO_FORWARDS
        return (
            f"{watched.name} got gradient from outside its layer's call, and nothing bounds "
            f"it. {_THROUGH_ITS_LAYER}. Remove hooks that change gradients."
        )
    if alone and watched.passes:
        return ACCUMULATION
    stale = watched.parameter.grad
    if stale is not None and not watched.passes and bool(stale.any()):
        return (
            f"{watched.name}.grad was not empty before the backward pass. Call "
            "optimizer.zero_grad() after every step, and leave p.grad alone."
        )
    return None


def _lower_precision(name: str, gradient: Tensor) -> str:
    return (
        f"{name} was turned to {gradient.dtype} after make_private: the sum over "
        "the batch would be rounded by more than one example's contribution. Keep "
        "trainable parameters in torch.float32."
    )


def _of_unknown_origin(name: str, compiled: bool) -> str:
    remedy = f"{_THROUGH_ITS_LAYER}; attach privacy before torch.compile."
    if compiled:
        remedy = "Run the first batch before torch.compile, so that it can be checked."
    return f"{name} got a gradient that did not come from its layer's call. {remedy}"
