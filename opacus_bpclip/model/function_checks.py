"""What may be wrong with a call of a function on parameters, each a sentence with the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opacus_bpclip.model.function_call import FunctionCall
from opacus_bpclip.model.plan import Template


def told(call: FunctionCall) -> str:
    """Return the names of the parameters that a function was called on."""
    return ", ".join(sorted(call.names))


def unseen(call: FunctionCall) -> str:
    """Say that trial runs have not shown such a call."""
    return (
        f"{told(call)}: the model calls the function {call.name} on it in a way that its trial "
        "run on made-up examples of these shapes did not show, so nothing tells which rows belong "
        "to which example. Compute the same way for every batch: without branches on the values of "
        "the data, and with what is made from parameters made anew in each forward pass."
    )


def shared_argument(call: FunctionCall) -> str:
    """Say that a call meets a parameter with data that belongs to no example."""
    return (
        f"{told(call)}: the function {call.name} meets it with something computed from an "
        "argument of the model that has no row for each example. If that is data, nothing shows "
        "whose it is; if it is public (positions, an index table), compute it inside the forward "
        "pass, register it as a buffer, or expand it to one row for each example."
    )


def data_argument(call: FunctionCall) -> str:
    """Say that a call meets a parameter with data that has lost the examples' number."""
    return (
        f"{told(call)}: the function {call.name} meets it with something computed from the "
        "examples that has no row for each of them: a selection by their values, or a number taken "
        "over the batch. Nothing shows which rows belong to which example. Keep one row for each "
        "example, and multiply by a mask in the place of a selection."
    )


def lost_argument(call: FunctionCall) -> str:
    """Say that an argument would get no gradient."""
    return (
        f"{told(call)}: the function {call.name} also has an argument of shape without examples "
        "that needs a gradient, and nothing follows how it was computed (an autograd function of "
        "somebody's own, a scripted function, a value kept from elsewhere): its gradient would be "
        "lost. Compute it from the parameters with functions of torch, in the same forward pass."
    )


def changed_argument(call: FunctionCall) -> str:
    """Say that an argument was changed after the call."""
    return (
        f"{told(call)}: an argument of the function {call.name} was changed in place after the "
        "call, and the examples' gradients are made from it. Do not work in place on it "
        "(inplace=False), or pass a copy."
    )


def went_around(name: str) -> str:
    """Say that a gradient reaches a parameter by a way that was not followed."""
    return (
        f"{name} got a gradient through a function that was not followed: an autograd function of "
        "somebody's own, an operation that keeps its arguments from torch's function modes, or the "
        "model returns what it computed from the parameter. Use it in the model's forward pass, "
        "with functions of torch."
    )


def wrong_places(call: FunctionCall, template: Template, examples: int) -> str | None:
    """Say that a call's arguments do not hold the batch where they should."""
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
                f"{told(call)}: the function {call.name} was called with {leaf} where the number "
                f"of examples should be, which is {examples}. Compute from the batch's own size."
            )
    return None


def wrong_results(
    call: FunctionCall, template: Template, results: Sequence[Any], examples: int
) -> str | None:
    """Say that a call's results do not hold the batch where they should."""
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
        f"{told(call)}: the function {call.name} met a tensor of shape {shape} in a batch of "
        f"{examples} examples, whose axis {axis} should hold one part for each of them. Keep one "
        "row for each example of the batch."
    )
