"""What may be wrong with the precision of a forward pass: sentences with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from opacus_bpclip.model.graphs import low_precision_behind
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.rules.precision import ACCEPTED, is_low, products_are_rounded


def unfit(name: str, dtype: torch.dtype, *, mean: bool) -> str | None:
    """Say that a part of the model computes in a dtype that does not train.

    Args:
        name: of the part.
        dtype: of what it made.
        mean: whether the loss is a mean over the batch.
    """
    if dtype in ACCEPTED or not dtype.is_floating_point:
        return rounded_mean(name, dtype) if mean else None
    return (
        f"{name} computes in {dtype}, whose largest number is so small that training needs a "
        "GradScaler, and its scale depends on the data. Use torch.bfloat16, by autocast or for the "
        "whole model, or torch.float32."
    )


def rounded_mean(name: str, dtype: torch.dtype) -> str | None:
    """Say that a mean's gradients are rounded to low precision.

    Args:
        name: of the part of the model that computes so.
        dtype: in what.
    """
    if not is_low(dtype):
        return None
    return (
        f"{name} computes in {dtype}, and the loss is a mean: it divides every gradient by the "
        "batch's size, which is private, and the quotient is then rounded so coarsely that one "
        "example would change the gradients of all others. Pass criterion= to make_private and "
        'compute the loss with what it returns, or use a sum with loss_reduction="sum".'
    )


def rounded_products(device: torch.device, kinds: Iterable[str]) -> str | None:
    """Say that a mean's gradients are rounded inside of products of float32 numbers.

    Args:
        device: the model's.
        kinds: of products that the model computes, see `kinds_of_products`.
    """
    if not products_are_rounded(device, kinds):
        return None
    backend = "torch.backends.mkldnn" if device.type == "cpu" else "torch.backends.cudnn"
    return (
        f"Products of float32 numbers are rounded on the device {device} "
        f"(torch.set_float32_matmul_precision, or {backend}.conv.fp32_precision), and the loss is "
        "a mean: it divides every gradient by the batch's size, which is private, and the quotient "
        "is then rounded so coarsely that one example would change the gradients of all others. "
        "Pass criterion= to make_private and compute the loss with what it returns, use a sum with "
        'loss_reduction="sum", or set the two to "highest" and "ieee".'
    )


def kinds_of_products(parameters: Iterable[Tensor]) -> tuple[str, ...]:
    """Return which kinds of products a model has: convolutions, if a parameter may be a kernel."""
    return ("matmul", "conv") if any(p.dim() > 2 for p in parameters) else ("matmul",)


def backward_under_autocast(*, compiled: bool) -> str:
    """Say that a backward pass runs under autocast.

    Args:
        compiled: whether the graph is, so that its sums over the batch are made by autocast, too.
    """
    why = (
        "its sums over the batch would be rounded by more than one example's contribution"
        if compiled
        else "a mean's gradients would be rounded so coarsely that one example changes all others"
    )
    return (
        f"backward() was called under autocast, where {why}. Call it outside of the autocast "
        "context, as torch recommends."
    )


def low_in_a_graph(layer: Layer, dtype: torch.dtype) -> str:
    """Say that a compiled layer would add up its examples' gradients in low precision."""
    return (
        f"{layer.name} turns numbers to {dtype} in its own forward, where its examples' gradients "
        "are added up: in a compiled graph nobody can make them one by one. Compute in the "
        "parameters' dtype there, and use autocast around the model, or train without "
        "torch.compile."
    )


class Roundings:
    """Where gradients of a mean may be rounded to low precision: in the model, and behind it.

    Args:
        parameters: the trainable ones.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._looks = 0  # at gradients that have arrived, which stalls an accelerator
        self._kinds = kinds_of_products(parameters)

    def of_products(self, device: torch.device | None) -> str | None:
        """Return `rounded_products` for the model.

        Args:
            device: where the model is; ``None`` if it trains nothing.
        """
        return None if device is None else rounded_products(device, self._kinds)

    def of_model(self, output: object) -> str | None:
        """Return `rounded_mean` of a forward pass that has run.

        Args:
            output: of the model, whatever holds its tensors.
        """
        tensors = _tensors_of(output)
        dtype = low_precision_behind(x.grad_fn for x in tensors)
        return rounded_mean("A part of the model", dtype) if dtype else None

    def watch(self, output: object, rows: int, fail: Callable[[str], object]) -> None:
        """Look at what the loss sends to the model's outputs.

        Args:
            output: of the model.
            rows: the batch's size.
            fail: called with what is wrong; raises.
        """
        if rows & (rows - 1) == 0:
            return  # A power of two: such a quotient is not rounded.
        for x in _tensors_of(output):
            if x.requires_grad and (x.device.type == "cpu" or self._looks < _LOOKS):
                x.register_hook(partial(self._look, fail))

    def _look(self, fail: Callable[[str], object], gradient: Tensor) -> None:
        self._looks += 1
        few = gradient.detach().flatten()[:_ENTRIES]
        # Numbers of float32 end in 16 zero bits only if they were rounded so, or if they are few:
        # signs, counts, or what is left where others cancel.
        if bool((few.bfloat16() == few).all()) and len(few.unique()) >= _DIFFERENT:
            fail(rounded_mean("The loss", torch.bfloat16) or "")


# On an accelerator, in how many backward passes to look at what arrives; at how many numbers, and
# how many different ones tell something.
_LOOKS = 4
_ENTRIES = 1024
_DIFFERENT = 64


def _tensors_of(output: object) -> list[Tensor]:
    leaves = [x.data if is_packed(x) else x for x in batch_leaves(output)]
    return [x for x in leaves if isinstance(x, Tensor)]
