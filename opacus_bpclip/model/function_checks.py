"""Error messages for calls of functions on parameters, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.plan import Template


def names_of(call: FunctionCall) -> str:
    """Return the names of the parameters that a function was called on."""
    return ", ".join(sorted(call.names))


def unseen(call: FunctionCall) -> str:
    """Return the message for a call that did not occur in the trial on made-up examples."""
    return (
        f"{names_of(call)}: the model calls the function {call.name} on it in a way that did not "
        "occur in the trial run on made-up examples of these shapes, so it is not known which rows "
        "belong to which example. Compute in the same way for every batch: do not branch on the "
        "values of the data, and compute what depends on parameters anew in each forward pass."
    )


def shared_argument(call: FunctionCall) -> str:
    """Return the message for an argument that was computed from data without a batch axis."""
    return (
        f"{names_of(call)}: the function {call.name} combines it with something computed from an "
        "argument of the model that does not have one row for each example. If it is data, it is "
        "not known which example it belongs to, so nothing can be bounded. If it is public "
        "(positions, an index table), compute it inside the forward pass, register it as a buffer, "
        "or expand it to one row for each example."
    )


def data_argument(call: FunctionCall) -> str:
    """Return the message for an argument computed from examples that has lost the batch axis."""
    return (
        f"{names_of(call)}: the function {call.name} combines it with something computed from the "
        "examples that does not have one row for each of them: a selection by their values, or a "
        "number computed over the batch. It is not known which rows belong to which example. Keep "
        "one row for each example, and multiply by a mask instead of selecting."
    )


def lost_argument(call: FunctionCall) -> str:
    """Return the message for an argument whose gradient would be lost."""
    return (
        f"{names_of(call)}: the function {call.name} has another argument without examples that "
        "needs a gradient, but it was computed out of sight (by a custom autograd function, by a "
        "scripted function, or outside this forward pass), so its gradient would be lost. Compute "
        "it from the parameters with functions of torch, in the same forward pass."
    )


def changed_argument(call: FunctionCall) -> str:
    """Return the message for an argument that was changed after the call."""
    return (
        f"{names_of(call)}: an argument of the function {call.name} was changed in place after the "
        "call, but the per-example gradients are computed from it. Do not change it in place "
        "(inplace=False), or pass a copy."
    )


def went_around(name: str) -> str:
    """Return the message for a gradient that reaches a parameter without having been clipped."""
    return (
        f"{name} got a gradient that was not clipped, through a function that cannot be followed: "
        "a custom autograd function, an operation that torch's function modes do not see, or a "
        "tensor computed from the parameter that the model returns. Use the parameter in the "
        "model's forward pass, with functions of torch."
    )


def wrong_places(call: FunctionCall, template: Template, examples: int) -> str | None:
    """Return a message if the batch is not where the template says in a call's arguments."""
    for index, (leaf, place) in enumerate(zip(call.leaves, template.arguments, strict=True)):
        if place is None:
            if isinstance(leaf, Tensor) and leaf.requires_grad and index not in call.made:
                return lost_argument(call)
            continue
        if isinstance(leaf, Tensor):
            if not place.fits(leaf, examples):
                return _wrong(call, tuple(leaf.shape), examples, place.axis)
        elif leaf != place.entries * examples:
            return (
                f"{names_of(call)}: the function {call.name} was called with the number {leaf} "
                f"instead of the number of examples, {examples}. Compute it from the batch's size."
            )
    return None


def wrong_results(
    call: FunctionCall, template: Template, results: Sequence[Any], examples: int
) -> str | None:
    """Return a message if the batch is not where the template says in a call's results."""
    if len(results) != len(template.outputs):
        return unseen(call)
    for x, place in zip(results, template.outputs, strict=True):
        if not isinstance(x, Tensor) or not x.requires_grad:
            continue
        if place is None:
            return unseen(call)
        if not place.fits(x, examples):
            return _wrong(call, tuple(x.shape), examples, place.axis)
    return None


def _wrong(call: FunctionCall, shape: tuple[int, ...], examples: int, axis: int) -> str:
    return (
        f"{names_of(call)}: the function {call.name} got or returned a tensor of shape {shape} in "
        f"a batch of {examples} examples. Its axis {axis} should hold one part for each of them. "
        "Keep one row for each example of the batch."
    )
