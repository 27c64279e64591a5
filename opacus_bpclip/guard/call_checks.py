"""What may be wrong with one call of a layer, each a sentence with the remedy, ``None`` if nothing.

`GradientGuard.require` turns a sentence into a refusal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opacus_bpclip.model.graphs import leaves_of
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import Inputs


def first_in_backward(layer: Layer) -> str:
    """Say that a layer runs in the backward pass without having run in the forward pass."""
    return (
        f"{layer.name} runs for the first time inside the backward pass, where its "
        "uses cannot be counted. Use checkpoint(..., use_reentrant=False)."
    )


def outside_forward(layer: Layer) -> str:
    """Say that a layer runs while its model does not."""
    return (
        f"{layer.name} was called outside its model's forward pass, where nothing "
        "ties its rows to the examples of the batch. Call the whole model, and have its forward "
        "return whatever the loss needs."
    )


def ran_twice(layer: Layer) -> str:
    """Say that a backward pass comes to a call of a layer for the second time."""
    return (
        "The backward pass ran twice for one forward pass through "
        f"{layer.name}: one example would contribute twice. Add the losses and "
        "call backward once."
    )


def changed_since(layer: Layer) -> str:
    """Say that a gradient was changed after it had been measured."""
    return (
        f"The gradient of {layer.name}'s output, or its input, was changed in place after it had "
        "been measured: by a hook, or by an autograd function that works in place on gradients. "
        "Return a new tensor there."
    )


def went_around(layer: Layer) -> str:
    """Say that a gradient reaches a layer by another way than its output."""
    return (
        f"{layer.name} got a gradient that went around the place where it is clipped: the layer's "
        "forward keeps its output, and the loss uses that. Use what the layer returns."
    )


def foreign_parameter(layer: Layer, y: Tensor, inputs: Inputs) -> str | None:
    """Say that a layer's own forward uses a parameter that its rule does not know of.

    Args:
        layer: the layer.
        y: what it made, before its graph is cut off.
        inputs: of what, and its own parameters.
    """
    given = [x for x in inputs if x is not None]
    for leaf in leaves_of(y, {x.grad_fn for x in given}):
        if all(leaf is not x for x in given):
            return (
                f"{layer.name} uses a parameter of shape {tuple(leaf.shape)} that is not its own: "
                "its gradient would be lost, for the layer's rule bounds its own alone. Use each "
                "parameter through its own layer."
            )
    return None


def used_too_often(layer: Layer) -> str:
    """Say that a layer runs more often in one forward pass than its bound counts."""
    times = "once" if layer.uses == 1 else f"{layer.uses} times"
    return (
        f"{layer.name} is used more than {times} in a forward pass: each use adds to one "
        f"example's contribution, and the bound counts {layer.uses}. Give each use its own "
        f"layer, or declare how many there are: BackpropClipping(uses={{{layer.name!r}: "
        "...})."
    )


def changed_layer(layer: Layer) -> str | None:
    """Say how a layer, or what runs around it, is not what was examined."""
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
            "not torch's own: if they change a number, as lossy compression of activations "
            "does, the layer's gradient is not the one that is bounded. Use save_on_cpu or "
            "checkpoint(..., use_reentrant=False)."
        )
    return None


def replaced_parameter(layer: Layer) -> str | None:
    """Say which parameter of a layer is not the one that is watched, but a multiple perhaps."""
    name = layer.replaced_parameter()
    if name is None:
        return None
    return (
        f"{layer.name}.{name} is not the parameter that make_private saw: it was replaced, "
        "it is computed from another (functional_call, spectral_norm), or the module's "
        "forward calls the module. Change the model first, then call make_private."
    )


def earlier_hook(layer: Layer, key: int) -> str | None:
    """Say that the forward hook with this key is not the first of its layer's."""
    if next(iter(layer.module._forward_hooks)) == key:
        return None
    return (
        f"Another forward hook of {layer.name} was put before the one that clips its "
        "upstream gradient. Register it without prepend=True."
    )


def wrong_batch(layer: Layer, inputs: Inputs, examples: int) -> str | None:
    """Say that the inputs of a call, batch first, are not those of this many examples."""
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
    """Return what an open number is on the batch that a graph is traced for; others as they are."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def wrong_rows(
    name: str, shape: tuple[int, ...], rows: int, examples: int, axis: int
) -> str | None:
    """Say that an input of this shape does not hold one row for each example.

    Args:
        name: of the module.
        shape: of its input.
        rows: how many the input has.
        examples: how many there are in the batch.
        axis: which of the input's is the batch, 0 or 1.
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
