"""Checks of one call of a layer: each returns an error message with the remedy, or ``None``.

`GradientGuard.require` raises a message that it is given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opacus_bpclip.model.changed import replaced_problem
from opacus_bpclip.model.coverage import batch_normalization_problem, batch_normalizations
from opacus_bpclip.model.graphs import leaves_of
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.replacements import mixes_examples
from opacus_bpclip.rules import Inputs


def first_in_backward(layer: Layer) -> str:
    """Return the message for a layer that runs in the backward pass and not in the forward pass."""
    return (
        f"{layer.name} runs for the first time inside the backward pass, where its "
        "uses cannot be counted. Use checkpoint(..., use_reentrant=False)."
    )


def outside_forward(layer: Layer) -> str:
    """Return the message for a layer that is called outside its model's forward pass."""
    return (
        f"{layer.name} was called outside its model's forward pass, so it is unknown which "
        "examples of the batch its rows are. Call the whole model, and have its forward "
        "return whatever the loss needs."
    )


def ran_twice(layer: Layer) -> str:
    """Return the message for a second backward pass through one call of a layer."""
    return (
        "The backward pass ran twice for one forward pass through "
        f"{layer.name}: one example would contribute twice. Add the losses and "
        "call backward once."
    )


def changed_since(layer: Layer) -> str:
    """Return the message for a gradient that was changed after its norm was measured."""
    return (
        f"The gradient of {layer.name}'s output, or its input, was changed in place after it had "
        "been measured: by a hook, or by an autograd function that works in place on gradients. "
        "Return a new tensor there."
    )


def went_around(layer: Layer) -> str:
    """Return the message for a gradient that reaches a layer other than through its output."""
    return (
        f"{layer.name} got a gradient that bypasses the clipping: the layer's forward stores its "
        "output, and the loss uses the stored tensor. Use what the layer returns."
    )


def unknown_parameter(layer: Layer, y: Tensor, inputs: Inputs) -> str | None:
    """Check that a layer's forward uses no parameter but the layer's own.

    Args:
        layer: the layer.
        y: its output, still attached to the layer's graph.
        inputs: its inputs and its own parameters.
    """
    given = [x for x in inputs if x is not None]
    for leaf in leaves_of(y, {x.grad_fn for x in given}):
        if all(leaf is not x for x in given):
            return (
                f"{layer.name} uses a parameter of shape {tuple(leaf.shape)} that is not its own: "
                "the layer's rule bounds only its own parameters, so the gradient of this one "
                "would be lost. Use each parameter through its own layer."
            )
    return None


def used_too_often(layer: Layer) -> str:
    """Return the message for a layer with more uses in a forward pass than its bound counts."""
    times = "once" if layer.uses == 1 else f"{layer.uses} times"
    return (
        f"{layer.name} is used more than {times} in a forward pass: each use adds to one "
        f"example's contribution, and the bound counts {layer.uses}. Give each use its own "
        f"layer, or declare how many there are: BackpropClipping(uses={{{layer.name!r}: "
        "...})."
    )


def changed_layer(layer: Layer) -> str | None:
    """Check that neither the layer nor the hooks around it have changed since make_private."""
    if layer.is_patched:
        return (
            f"{layer.name} was changed after make_private (its forward was replaced, an option "
            "was set, or a parametrization was added): its rule no longer describes it. Change "
            "the model first, then call make_private."
        )
    if torch.nn.modules.module._global_forward_hooks:
        return (
            "A forward hook on every module (register_module_forward_hook) may change what a "
            f"layer such as {layer.name} returns before it is clipped. Remove the hook."
        )
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if saving is not None and not _of_torch(saving[0]):
        return (
            f"{layer.name} runs under hooks on saved tensors (saved_tensors_hooks) that are "
            "not torch's own: if they change a value, as lossy compression of activations "
            "does, the layer's gradient is not the one that is bounded. Use save_on_cpu or "
            "checkpoint(..., use_reentrant=False)."
        )
    return None


def replaced_parameter(layer: Layer) -> str | None:
    """Check that a layer computes with the parameters that are watched.

    A parameter in the place of a watched one may be, for instance, a multiple of it.
    """
    name = layer.replaced_parameter()
    return None if name is None else replaced_problem(f"{layer.name}.{name}")


def earlier_hook(layer: Layer, key: int) -> str | None:
    """Check that the forward hook with this key runs before the layer's other hooks."""
    if next(iter(layer.module._forward_hooks)) == key:
        return None
    return (
        f"Another forward hook of {layer.name} runs before the one that clips its "
        "upstream gradient. Register it without prepend=True."
    )


def wrong_batch(layer: Layer, inputs: Inputs, examples: int) -> str | None:
    """Check that the inputs of a call, batch first, have one row for each example."""
    first = inputs[0]
    assert first is not None
    smallest, largest = layer.rule.expected_dims()
    if first.dim() < smallest or (largest is not None and first.dim() > largest):
        return (
            f"{layer.name} got an input of shape {_passed_shape(layer, first)}; with the "
            f"batch first its rule needs {smallest}{' or more' if largest is None else ''} "
            "axes. Add the batch axis."
        )
    for size in layer.rule.batch_sizes(inputs):
        size = number(size)
        if size != examples:
            shape = _passed_shape(layer, first)
            return wrong_rows(layer.name, shape, size, examples, layer.arguments.batch_axis)
    return None


def number(size: Any) -> Any:
    """Return a symbolic size's value on the batch that is traced; any other size as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def wrong_rows(
    name: str, shape: tuple[int, ...], rows: int, examples: int, axis: int
) -> str | None:
    """Check that an input has one row for each example.

    Args:
        name: the module's name.
        shape: the input's shape, for the message.
        rows: the input's number of rows.
        examples: the number of examples in the batch.
        axis: the input's batch axis, 0 or 1.
    """
    if rows == examples:
        return None
    order = ("first", "second")[axis]
    return (
        f"{name} got an input of shape {shape} in a batch of {examples} examples: "
        f"its {order} axis must be the batch, or one factor would scale a mix of examples. "
        "Expand inputs that are shared by the batch (such as position embeddings) and keep "
        f"the batch axis {order}."
    )


def _passed_shape(layer: Layer, x: Tensor) -> tuple[int, ...]:
    return tuple(layer.arguments.as_passed(x).shape)


def _of_torch(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.")


def normalizes_batch(model: nn.Module) -> str | None:
    """Look for a batch normalisation that uses the batch's statistics."""
    for name, norm in batch_normalizations(model).items():
        if mixes_examples(norm):
            return batch_normalization_problem(name, norm)
    return None
