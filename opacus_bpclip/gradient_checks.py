"""What may be wrong with a gradient that arrives at its parameter, each a sentence, or ``None``.

`GradientGuard.require` turns a sentence into a refusal.
"""

from __future__ import annotations

from torch import Tensor

from opacus_bpclip.coverage import TRAINABLE_DTYPES
from opacus_bpclip.provenance import WatchedParameter

_THROUGH_ITS_LAYER = (
    "Use the parameter through its layer only, not directly (F.linear(x, layer.weight), a penalty "
    "on the weights in the loss)"
)


def lower_precision(watched: WatchedParameter, gradient: Tensor) -> str | None:
    """Say that a parameter was turned to a dtype that sums are not bounded in."""
    if gradient.dtype in TRAINABLE_DTYPES:
        return None
    return (
        f"{watched.name} was turned to {gradient.dtype} after make_private: the sum over "
        "the batch would be rounded by more than one example's contribution. Keep "
        "trainable parameters in torch.float32."
    )


def unaccounted(watched: WatchedParameter, gradient: Tensor, *, compiled: bool) -> str | None:
    """Say that a gradient is not what the parameter's layer sent.

    Args:
        watched: the parameter.
        gradient: what arrived.
        compiled: whether part of the forward pass was traced, and so unseen.
    """
    if watched.sent:
        if watched.is_sum_of_sent(gradient):
            return None
        return (
            f"{watched.name} got gradient from outside its layer's call, and nothing bounds "
            f"it. {_THROUGH_ITS_LAYER}, and without hooks that change gradients."
        )
    if compiled and watched.vouched:
        return None
    remedy = f"{_THROUGH_ITS_LAYER}; attach privacy before torch.compile."
    if compiled:
        remedy = "Run the first batch before torch.compile, so that it can be checked."
    return f"{watched.name} got a gradient that did not come from its layer's call. {remedy}"


def second_batch(watched: WatchedParameter, *, batches: int) -> str | None:
    """Say that gradients of several batches add up.

    Args:
        watched: the parameter.
        batches: from how many forward passes the gradients at hand came.
    """
    if not watched.passes and batches <= 1:
        return None
    return (
        "Poisson sampling is not compatible with grad accumulation: two batches may share "
        "an example. Call optimizer.step() and zero_grad() after every backward pass, or "
        "use BatchMemoryManager."
    )


def stale_gradient(watched: WatchedParameter) -> str | None:
    """Say that something lay in ``p.grad`` before the first backward pass."""
    stale = watched.parameter.grad
    if watched.passes or stale is None or not bool(stale.any()):
        return None
    return (
        f"{watched.name}.grad was not empty before the backward pass. Call "
        "optimizer.zero_grad() after every step, and leave p.grad alone."
    )
