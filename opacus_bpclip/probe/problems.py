"""Error messages of the trial runs, with the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn


class Problem(NamedTuple):
    """What trial runs have found wrong.

    Attributes:
        module: dotted path in the model, ``"(root)"`` for the model itself.
        text: the error message, with the reason and the remedy.
        of_loss: whether it is about a loss that the model itself returns.
    """

    module: str
    text: str
    of_loss: bool = False


def owner(name: str) -> str:
    """Return the module that has a parameter or buffer of this name."""
    return name.rpartition(".")[0] or "(root)"


class UntriedError(Exception):
    """The model cannot be run on this batch or on parts of it, so it could not be tried."""


class RefusedError(Exception):
    """The model has gradients that cannot be bounded.

    Args:
        problem: what is wrong.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def first_line(error: Exception) -> str:
    """Return the first line of an error, with its type."""
    said = str(error) if isinstance(error, UntriedError) else f"{type(error).__name__}: {error}"
    return said.splitlines()[0]


_WHY = (
    "The bound holds for an example's own contribution; in a model that couples examples, one "
    "example also changes the contributions of others."
)
_REMEDY = (
    "Compute each example's output from that example alone: no mean, softmax, normalisation or "
    "division over the batch, no other rows (GroupNorm or LayerNorm in place of BatchNorm). If you "
    "are certain that the loss never uses it, set BackpropClipping(probe=False)."
)


def coupled(name: str, kind: str, cause: str) -> str:
    """Return the message for a module that couples examples."""
    return (
        f"{name} ({kind}) couples examples: its output for one example changes with {cause}. "
        f"{_WHY} {_REMEDY}"
    )


def moved(name: str, module: nn.Module, views: int) -> str:
    """Return the message for a module whose rows are not in the batch's order.

    Args:
        name: the module's name.
        module: the module.
        views: the number of rows of each example that it gets in `FoldViews`, otherwise 1.
    """
    kind = type(module).__name__
    if views > 1:
        return (
            f"{name} ({kind}): in FoldViews, each {views} rows side by side must be the views of "
            "one example, which are measured together. Here the rows are in another order: an "
            f"example would contribute up to {views} times what the noise is made for. Keep the "
            "batch's order inside the model."
        )
    return (
        f"{name} ({kind}): its rows are in another order than the examples of the batch, and with "
        'allocation="joint" all layers use one factor for each row of the batch: it would scale '
        "a mix of examples. Keep the batch's order inside the model (sequences need no sorting: "
        "pack_padded_sequence(..., enforce_sorted=False)), or give each layer a budget of its own: "
        'BackpropClipping(allocation="dimension").'
    )


def untried(reason: str, order: str, square: tuple[int, ...] | None) -> str:
    """Return the message for a model that could not be tried.

    Args:
        reason: why.
        order: which axis of a tensor is the batch, ``"first"`` or ``"second"``.
        square: the shape of an argument that may have as many rows as the batch by accident.
    """
    maybe_shared = "" if square is None else _maybe_shared(square)
    return (
        "Whether examples influence each other inside the model cannot be tried, since it does "
        f"not run on a part of its batch ({reason}): one example might change the contributions "
        f"of others. Pass the examples as tensors that have one row each, batch {order}. If "
        "you are certain that no example's output depends on another's, set "
        f"BackpropClipping(probe=False).{maybe_shared}"
    )


def _maybe_shared(shape: tuple[int, ...]) -> str:
    return (
        f" The argument of shape {shape} is taken for one row of each example, since it is as "
        "long as the batch. If it is the same for all examples (a mask over pairs of tokens), make "
        "it a buffer of the model (register_buffer), or expand it to one for each example; with "
        "physical_batch_size, another size helps, too."
    )


NOT_REPEATABLE = (
    "The model returned other numbers when it was run on the same batch again, with the same "
    "state of the random number generators, so coupled examples cannot be detected. If it keeps "
    "something of its examples for later batches (statistics, a memory, hidden states), these "
    "examples change the contributions of later ones: leave that out. Keep other state, such as a "
    "counter of steps, in a buffer (register_buffer), and draw from torch's own generator. If you "
    "are certain that no example's output depends on another's, set BackpropClipping(probe=False)."
)


PADDED = (
    "The data loader's collate_fn pads items to the longest one of a batch, and what the model "
    "makes of an item depends on how far it is padded. A long example would change the "
    "contributions of all others in its batch, and the noise is not made for that. Pad all items "
    "to one public length, or leave padding out in the model: mask it, take the mean or the last "
    "output over an item's own positions, pack sequences. If you are certain that no example's "
    "output depends on another's, set BackpropClipping(probe=False)."
)


def buffered(name: str) -> str:
    """Return the message for a buffer that depends on the batch."""
    return (
        f"The buffer {name} stores values computed from the batch, without noise: the trained "
        "model would contain private data. Keep its module from updating it (evaluation mode, "
        "frozen statistics). Later outputs and gradients did not depend on it: if you only watch "
        "it, register it with persistent=False, and keep it out of all that you publish."
    )


def counted(name: str) -> str:
    """Return the message for a buffer that depends only on how many examples a batch has."""
    return (
        f"The buffer {name} depends on how many examples the batches have (it counts them, or "
        "grows with them), without noise: the trained model would contain private data. Later "
        "outputs and gradients did not depend on it: register it with persistent=False, and keep "
        "it out of all that you publish."
    )


def carried(names: Sequence[str]) -> str:
    """Return the message for state by which one batch influences later ones.

    Args:
        names: the buffers that differ after other batches; none if the state is elsewhere.
    """
    where = f"the buffer {', '.join(names)}" if names else "an attribute or a global variable"
    return (
        f"The model keeps something of its examples in {where}, and later forward passes depend on "
        "it: on made-up examples their outputs or gradients changed with the examples of an "
        "earlier batch. An example would change the contributions of batches in which it is not, "
        "and the noise is not made for that. Statistics of earlier batches, memory banks and "
        "hidden states that go on must stay out: begin each forward pass without them (zeros, a "
        "trained parameter, numbers from public data), or keep their module from updating them "
        "(evaluation mode). A counter of steps may stay in a buffer, but no count of examples."
    )


def not_additive(*, mean: bool) -> str:
    """Return the message for an output that is neither per example nor their mean or sum."""
    return (
        "The model returns a tensor without a batch axis that is not "
        f"{'the mean' if mean else 'the sum'} of its values for each example alone, which "
        f"loss_reduction={'mean' if mean else 'sum'!r} requires. A loss that divides by the number "
        "of tokens or labels that count in the whole batch (ignored positions, padding, class "
        f"weights) is an example. {_WHY} Return one loss for each example; or do not pass the "
        "labels to the model, and compute the loss from its logits with the criterion that "
        "make_private(criterion=opacus_bpclip.CrossEntropy(ignore_index=...)) returns, which a "
        "transformers Trainer takes as compute_loss_func. If you are certain that the loss never "
        "uses this tensor, set BackpropClipping(probe=False)."
    )


_OWN_LAYER = (
    "Use the parameter for each example by itself, in a layer that has a rule, or in a separate "
    "module with a rule that you register (docs/custom-layers.md); or freeze it."
)


def unlike_alone(parameters: str, function: str, what: str, gap: float) -> str:
    """Return the message for a function that treats an example alone otherwise than in a batch."""
    difference = {
        "output": "its result for an example alone differs from the example's part of its result "
        "for the batch",
        "gradient": "the gradient of an example alone differs from the gradient that autograd "
        "finds for it in the batch",
    }[what]
    return (
        f"{parameters}: the function {function} was tried on made-up examples, and {difference} "
        f"(relative difference {gap:.2g}). {_OWN_LAYER}"
    )


def of_complex_numbers(parameters: str, function: str) -> str:
    """Return the message for a function on parameters whose result is complex."""
    return (
        f"{parameters}: the function {function} computes with complex numbers, whose rows are not "
        "told apart. Compute with real and imaginary parts, which are real: "
        "(a + bi)(c + di) is ac - bd and ad + bc. Or freeze these parameters."
    )


def routed(name: str) -> str:
    """Return the message for a layer whose rows are not in proportion to the batch's size."""
    return (
        f"{name}: its number of rows, or of calls, is not in proportion to the number of examples: "
        "rows are chosen by the values of the data (a mixture of experts that routes them), or "
        "there is a loop over the examples. It is then unknown which rows belong to which example. "
        "Call every layer on all examples at once, and choose afterwards: run every expert on "
        "every row, and multiply its output by the gate, which is zero for the other experts "
        "(dense routing)."
    )


def pairs_in_function(parameters: str, function: str) -> str:
    """Return the message for a function whose sizes are not in proportion to the batch's."""
    return (
        f"{parameters}: the function {function} has an argument or a result whose size changes "
        "with the batch, but does not have a fixed number of entries for each example: rows are "
        "routed by the values of the data, or it holds pairs of examples, or rows of the parameter "
        f"itself. {_OWN_LAYER}"
    )


def packed_functions() -> str:
    """Return the message for functions on the rows of packed sequences."""
    return (
        "The model takes packed sequences, and calls functions or layers on their rows. A packed "
        "sequence has the rows of all examples time step by time step, so an example has no fixed "
        "number of rows. Unpack the sequences first (pad_packed_sequence), so that each example "
        "has its row."
    )


def moved_in_function(parameters: str, function: str) -> str:
    """Return the message for a function whose rows are not in the batch's order."""
    return (
        f"{parameters}: the rows of the function {function} are not those of the examples at the "
        "same places of the batch: the model changes their order, or mixes examples (attention or "
        "a mean across the batch). One factor for each example of the batch would scale a mix of "
        "examples. Inside the model, keep the batch's order and compute each example's rows from "
        f"that example alone. {_OWN_LAYER}"
    )


def unsteady_functions() -> str:
    """Return the message for a model that calls other functions on a smaller batch."""
    return (
        "The model calls other functions on a part of a batch than on the whole batch (a loop over "
        "examples, or a branch on their values). Then the functions that it calls on parameters "
        "outside of layers with a rule cannot be followed. Write the forward pass for a whole "
        "batch, without branches on values."
    )
