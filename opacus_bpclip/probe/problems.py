"""What trying a model out may find wrong, each with the reason and the remedy."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """What is wrong, and where.

    Attributes:
        module: dotted path in the model, ``"(root)"`` for the model itself.
        text: says so, with the reason and the remedy.
        of_loss: whether it is about a loss that the model itself returns.
    """

    module: str
    text: str
    of_loss: bool = False


class UntriedError(Exception):
    """The model cannot be run on this batch or on parts of it: nothing was found out."""


class RefusedError(Exception):
    """A model does something that cannot be bounded.

    Args:
        problem: what is wrong.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    said = str(error) if isinstance(error, UntriedError) else f"{type(error).__name__}: {error}"
    return said.splitlines()[0]


_WHY = (
    "The bound holds for what an example contributes on its own; coupled examples move each "
    "other's gradients beyond it."
)
_REMEDY = (
    "Compute from each example alone: no mean, softmax, normalisation or division over the batch, "
    "no neighbours (GroupNorm or LayerNorm in place of BatchNorm). If you are certain that the "
    "loss never sees it, set BackpropClipping(probe=False)."
)


def coupled(name: str, kind: str, cause: str) -> str:
    """Say that a module couples examples."""
    return (
        f"{name} ({kind}) couples examples: what it makes of one changes with {cause}. {_WHY} "
        f"{_REMEDY}"
    )


def moved(name: str, kind: str) -> str:
    """Say that a module's rows are not the batch's."""
    return (
        f"{name} ({kind}): its rows are in another order than the examples of the batch, and with "
        'allocation="joint" one factor for each row of the batch serves all layers: it would scale '
        "a mix of examples. Keep the batch's order inside the model (sequences need no sorting: "
        "pack_padded_sequence(..., enforce_sorted=False)), or give each layer a budget of its own: "
        'BackpropClipping(allocation="dimension").'
    )


def untried(reason: str, order: str) -> str:
    """Say that nothing could be found out."""
    return (
        "Whether examples influence each other inside the model cannot be tried, since it does "
        f"not run on a part of its batch ({reason}): nothing would bound what one example does "
        f"to the others. Pass the examples as tensors that have one row each, batch {order}. If "
        "you are certain that no example's output depends on another's, set "
        "BackpropClipping(probe=False)."
    )


NOT_REPEATABLE = (
    "The model returned something else when it was run on the same batch again, from the same "
    "state of the random number generators: whether its examples are coupled cannot be seen. Keep "
    "what changes from call to call in buffers, and draw from torch's own generator. If you are "
    "certain that no example's output depends on another's, set BackpropClipping(probe=False)."
)


def buffered(name: str) -> str:
    """Say that a buffer takes up the batch."""
    return (
        f"The buffer {name} takes up values of the batch, and no noise is added to it: whoever "
        "gets the model gets them. Keep its module from updating it (evaluation mode, frozen "
        "statistics), or register it with persistent=False if it never influences an output."
    )


def not_additive(*, mean: bool) -> str:
    """Say that an output is neither one row for each example nor their mean or sum."""
    return (
        "The model returns a tensor without a batch axis that is not "
        f"{'the mean' if mean else 'the sum'} of what its examples give alone, as "
        f"loss_reduction={'mean' if mean else 'sum'!r} has it. A loss that divides by how many "
        "tokens or labels of the whole batch count (ignored positions, padding, class weights) is "
        f"such a one. {_WHY} Return one loss for each example; or do not pass the labels to the "
        "model, and compute the loss from its logits with what "
        "make_private(criterion=opacus_bpclip.CrossEntropy(ignore_index=...)) returns, which a "
        "transformers Trainer takes as compute_loss_func. If you are certain that the loss never "
        "sees this tensor, set BackpropClipping(probe=False)."
    )


_OWN_LAYER = (
    "Use the parameter for each example by itself, in a layer that has a rule, or in a module of "
    "its own with a rule that you register (docs/custom-layers.md); or freeze it."
)


def unlike_alone(parameters: str, function: str, what: str, gap: float) -> str:
    """Say that a function does not treat an example alone as it does in a batch."""
    said = {
        "output": "what it returns for an example alone is not the example's part of what it "
        "returns for the batch",
        "gradient": "the gradient that an example alone has is not the one that autograd finds for "
        "it in the batch",
    }[what]
    return (
        f"{parameters}: the function {function} was tried on made-up examples, and {said} "
        f"(relative difference {gap:.2g}). {_OWN_LAYER}"
    )


def routed(name: str) -> str:
    """Say that a layer's rows do not follow the examples of the batch."""
    return (
        f"{name}: how many rows it is called on, or how often, does not follow the number of "
        "examples: rows are chosen by the values of the data (a mixture of experts that routes "
        "them), or there is a loop over the examples. Nothing shows then which rows belong to "
        "which example. Call every layer on all examples at once, and choose afterwards: let every "
        "expert see every row, and multiply what it returns by the gate, which is zero for the "
        "others (dense routing)."
    )


def pairs_in_function(parameters: str, function: str) -> str:
    """Say that a function's sizes do not follow the batch's in proportion."""
    return (
        f"{parameters}: the function {function} has an argument or a result whose size follows the "
        "batch, but not as so many entries for each example: rows are routed by the values of the "
        f"data, or it holds pairs of examples, or rows of the parameter itself. {_OWN_LAYER}"
    )


def packed_functions() -> str:
    """Say that functions meet the rows of packed sequences."""
    return (
        "The model takes packed sequences, and calls functions or layers on their rows, which are "
        "those of all examples, step by step: how many each has is its own. Unpack the sequences "
        "first (pad_packed_sequence), so that each example has its row."
    )


def moved_in_function(parameters: str, function: str) -> str:
    """Say that a function does not have the examples' rows where they are in the batch."""
    return (
        f"{parameters}: the rows that the function {function} meets are not those of the examples "
        "at these places of the batch: the model puts them in another order, or mixes examples "
        "(attention or a mean across the batch). One factor for each example of the batch would "
        "scale a mix of them. Keep the batch's order, and each example to itself, inside the "
        f"model. {_OWN_LAYER}"
    )


def unsteady_functions() -> str:
    """Say that a model calls other functions on a smaller batch."""
    return (
        "The model calls other functions on a part of a batch than on the whole of it (a loop over "
        "examples, or a branch that their values decide), and functions that it calls on "
        "parameters outside of layers with a rule cannot be followed then. Write the forward pass "
        "for a whole batch, without branches on values."
    )
