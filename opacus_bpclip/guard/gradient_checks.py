"""Checks of a parameter's gradient: each returns an error message with the remedy.

`GradientGuard.require` raises a message that it is given.
"""

from __future__ import annotations

from torch import Tensor

from opacus_bpclip.guard.watched import WatchedParameter
from opacus_bpclip.rules.precision import norm_dtype

_THROUGH_ITS_LAYER = (
    "Use the parameter through its layer only, not directly as F.linear(x, layer.weight) does. In "
    "place of a penalty on the weights in the loss, give the optimizer weight_decay, or shrink the "
    "weights after its step"
)
_IN_A_GRAPH = (
    "in a graph that torch.compile has traced. Train without torch.compile, or register a rule for "
    "its module (docs/custom-layers.md)"
)


def functions_in_a_graph(watched: WatchedParameter) -> str:
    """Return the message for a parameter that a graph uses outside of layers with a rule."""
    return (
        f"{watched.name} is used by functions outside of a layer with a rule, which cannot be "
        f"followed {_IN_A_GRAPH}."
    )


def unclipped_gradient(watched: WatchedParameter, *, graphs: bool) -> str:
    """Return the message for a gradient that autograd sends to a parameter itself.

    The gradients that are clipped never arrive there.

    Args:
        watched: the parameter.
        graphs: whether the model has compiled graphs.
    """
    return (
        f"{watched.name} got gradient from outside its layer's call, and nothing bounds it. "
        f"{_THROUGH_ITS_LAYER}."
        + f" Functions on parameters cannot be followed {_IN_A_GRAPH}."
        * graphs
    )


def unconfirmed_gradient(watched: WatchedParameter) -> str:
    """Return the message for a parameter with a gradient from a graph and none in eager mode."""
    return (
        f"A compiled graph sent a gradient to {watched.name}, but its layer's call made none in "
        f"eager mode, so it may not be clipped. {_THROUGH_ITS_LAYER}. If the loss "
        "uses more of the model than its forward returns, run one batch without torch.compile "
        "first, with backward()."
    )


def unrehearsed(reason: str) -> str:
    """Return the message for a form in which the model could not be rehearsed.

    Args:
        reason: what went wrong.
    """
    return (
        "The compiled model was called in a way (arguments, flags, numbers of axes, training or "
        "evaluation) that was never checked in eager mode, and a compiled graph does not show "
        f"how it uses its parameters. Trying it on made-up examples failed ({reason}). Run one "
        "batch of each way of calling it without torch.compile first, with backward(); evaluate "
        "under torch.no_grad()."
    )


def unusable_gradient(watched: WatchedParameter, gradient: Tensor) -> str | None:
    """Check the dtype of a sum of contributions, and that ``p.grad`` was empty before it."""
    if gradient.dtype != norm_dtype(gradient.dtype):
        return (
            f"{watched.name}'s gradient is a sum over the batch in {gradient.dtype}, which rounds "
            "it by more than one example's contribution. In a compiled model keep trainable "
            "parameters in torch.float32, and use autocast for low precision."
        )
    stale = watched.parameter.grad
    # Reading values stalls an accelerator, so do it last, and skip gradients that were cleared.
    if stale is not None and watched.is_empty and not _is_cleared(stale) and bool(stale.any()):
        return (
            f"{watched.name}.grad was not empty before the backward pass. Call "
            "optimizer.zero_grad() after every step, and leave p.grad alone."
        )
    return None


def mark_as_cleared(gradient: Tensor) -> None:
    """Mark a gradient as zeros; an in-place change takes the mark away."""
    gradient._cleared_version = gradient._version  # type: ignore[attr-defined]


def _is_cleared(gradient: Tensor) -> bool:
    return getattr(gradient, "_cleared_version", None) == gradient._version
