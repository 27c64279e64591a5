"""What may be wrong with the precision of a forward pass: sentences with the remedy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.rules.precision import ACCEPTED, is_autocast, is_low, products_are_rounded


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


def rounded_products(device: torch.device) -> str | None:
    """Say that a mean's gradients are rounded inside of products of float32 numbers.

    Args:
        device: the model's.
    """
    if not products_are_rounded(device):
        return None
    return (
        f"Products of float32 numbers are rounded on the device {device} "
        "(torch.set_float32_matmul_precision, or a fp32_precision of torch.backends), and the loss "
        "is a mean: it divides every gradient by the batch's size, which is private, and the "
        "quotient is then rounded so coarsely that one example would change the gradients of all "
        "others. Pass criterion= to make_private and compute the loss with what it returns, use a "
        'sum with loss_reduction="sum", or ask for "highest" and "ieee".'
    )


class Roundings:
    """The ways of calling a model in which no gradient goes through low precision."""

    def __init__(self) -> None:
        self._passed: set[object] = set()

    def problem(self, form: object, output: object) -> str | None:
        """Return `rounded_mean` of a forward pass that has run; looked at once for each way.

        Args:
            form: tells ways of calling the model apart.
            output: of the model, whatever holds its tensors.
        """
        tensors = [x for x in batch_leaves(output) if isinstance(x, Tensor)]
        key = form, is_autocast(), tuple(x.dtype for x in tensors)
        if key in self._passed:
            return None
        dtype = _low_precision_behind(tensors)
        if dtype is None:
            self._passed.add(key)
            return None
        return rounded_mean("A part of the model", dtype)


def _low_precision_behind(outputs: Iterable[Tensor]) -> torch.dtype | None:
    """Return the low precision that the gradients of some tensors go through, if any."""
    waiting: list[Node | None] = [x.grad_fn for x in outputs]
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for made in node._input_metadata:
            if is_low(made.dtype):
                dtype: torch.dtype = made.dtype
                return dtype
        waiting += [before for before, _ in node.next_functions]
    return None
