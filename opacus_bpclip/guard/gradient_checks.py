"""What may be wrong with a parameter's gradient: a sentence with the remedy.

`GradientGuard.require` turns a sentence into a refusal.
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
    """Say that functions outside of layers with a rule use a parameter of a compiled model."""
    return (
        f"{watched.name} is used by functions outside of a layer with a rule, which cannot be "
        f"followed {_IN_A_GRAPH}."
    )


def foreign_gradient(watched: WatchedParameter, *, graphs: bool) -> str:
    """Say that a gradient has arrived at a parameter itself.

    Args:
        watched: the parameter.
        graphs: whether there are compiled graphs of the model.
    """
    return (
        f"{watched.name} got gradient from outside its layer's call, and nothing bounds it. "
        f"{_THROUGH_ITS_LAYER}."
        + f" Functions on parameters cannot be followed {_IN_A_GRAPH}."
        * graphs
    )


def unconfirmed_gradient(watched: WatchedParameter) -> str:
    """Say that a graph has sent a parameter's gradient, and eager mode has made none."""
    return (
        f"A compiled graph sent a gradient to {watched.name}, and in eager mode none came out of "
        f"its layer's call: nothing shows that it is clipped. {_THROUGH_ITS_LAYER}. If the loss "
        "uses more of the model than its forward returns, run one batch without torch.compile "
        "first, with backward()."
    )


def unrehearsed(reason: str) -> str:
    """Say that a way of calling a compiled model could not be tried in eager mode.

    Args:
        reason: why not.
    """
    return (
        "The compiled model was called in a way (arguments, flags, numbers of axes, training or "
        "evaluation) whose use of its parameters was never checked: a compiled graph does not "
        f"show it, and made-up examples could not be tried in eager mode ({reason}). Run one batch "
        "of each way of calling it without torch.compile first, with backward(); evaluate under "
        "torch.no_grad()."
    )


def unusable_gradient(watched: WatchedParameter, gradient: Tensor) -> str | None:
    """Say what is wrong with a sum of contributions, or with what was there before it."""
    if gradient.dtype != norm_dtype(gradient.dtype):
        return (
            f"{watched.name}'s gradient is a sum over the batch in {gradient.dtype}, which rounds "
            "it by more than one example's contribution. In a compiled model keep trainable "
            "parameters in torch.float32, and use autocast for low precision."
        )
    stale = watched.parameter.grad
    # Reading stalls an accelerator: last, and not where the optimizer has just written the zeros.
    if stale is not None and watched.is_empty and not _is_cleared(stale) and bool(stale.any()):
        return (
            f"{watched.name}.grad was not empty before the backward pass. Call "
            "optimizer.zero_grad() after every step, and leave p.grad alone."
        )
    return None


def mark_as_cleared(gradient: Tensor) -> None:
    """Note that a gradient holds zeros, until somebody changes it in place."""
    gradient._cleared_version = gradient._version  # type: ignore[attr-defined]


def _is_cleared(gradient: Tensor) -> bool:
    return getattr(gradient, "_cleared_version", None) == gradient._version
