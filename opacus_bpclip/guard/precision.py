"""Checks of a pass's precision: each returns an error message with the remedy, or ``None``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from opacus_bpclip.config import AdaptiveThreshold, BackpropClipping
from opacus_bpclip.model.graphs import low_precision_behind
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.model.recurrence import is_packed
from opacus_bpclip.probe.leaves import batch_leaves
from opacus_bpclip.rules.precision import ACCEPTED, is_low, products_are_rounded


def unfit(name: str, dtype: torch.dtype, *, mean: bool) -> str | None:
    """Check that a part of the model computes in a dtype that can be trained in.

    Args:
        name: the part's name.
        dtype: its output's dtype.
        mean: whether the loss is a mean over the batch.
    """
    if dtype in ACCEPTED or not dtype.is_floating_point:
        return rounded_mean(name, dtype) if mean else None
    return (
        f"{name} computes in {dtype}, whose largest number is so small that training needs a "
        "GradScaler, and its scale depends on the data. Use torch.bfloat16, by autocast or for the "
        "whole model, or torch.float32."
    )


def rounded_options(config: BackpropClipping, parameters: Iterable[nn.Parameter]) -> str | None:
    """Refuse options that need more of the gradients than a plain mean in float32 leaves.

    Args:
        config: the options.
        parameters: the model's.
    """
    return rounded_option(config) if _any_single(parameters) else None


def rounded_option(config: BackpropClipping) -> str | None:
    """Return the message for options that a plain mean needs double precision for, if any."""
    if isinstance(config.threshold, AdaptiveThreshold):
        return _ROUNDED_COUNTS
    if config.propagate == "unclipped" and config.allocation != "joint":
        return _ROUNDED_BELOW
    return _ROUNDED_WHITENED if config.whitening is not None else None


# With many more equal examples than this in one backward pass, the rounding of a plain mean's sums
# comes near the claim. Measured in docs/guarantee.md, "What a plain mean leaves".
_MOST_ROWS = 4096


def rounded_sums(
    rows: int | None, expected: float | None, parameters: Iterable[nn.Parameter]
) -> str | None:
    """Refuse a plain mean in single precision over very large batches.

    Whether a batch is refused must not depend on its private size. It is refused if it has more
    than half of the limit where more than the limit are expected: of all batches that are not
    split, or of none.

    Args:
        rows: the number of examples in one backward pass; ``None`` if it is not known.
        expected: the expected number of examples of a step, a public number; ``None`` likewise.
        parameters: the model's.
    """
    if rows is None or expected is None or expected <= _MOST_ROWS or rows <= _MOST_ROWS // 2:
        return None
    if not _any_single(parameters):
        return None
    return (
        f"About {expected:,.0f} examples are summed at once. {_ROUNDED}in so many equal examples "
        "the rounding may add up to as much as one example may contribute. Pass the criterion to "
        "make_private (criterion=nn.CrossEntropyLoss()) and compute the loss with the one that is "
        'returned, or train with loss_reduction="sum", or split the batch (BatchMemoryManager, '
        f"physical_batch_size) into parts of at most {_MOST_ROWS // 2:,}."
    )


def _any_single(parameters: Iterable[Tensor]) -> bool:
    return any(p.requires_grad and _is_single(p.dtype) for p in parameters)


def _is_single(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != torch.float64


_ROUNDED = (
    "With a mean loss every example's gradient is rounded by the private size of the batch, and "
)

_REMEDY = (
    "Pass the criterion to make_private (criterion=nn.CrossEntropyLoss()) and compute the loss "
    'with the one that is returned, or train with loss_reduction="sum", or use '
)

_ROUNDED_COUNTS = (
    f"An AdaptiveThreshold counts the examples within it. {_ROUNDED}many examples whose gradients "
    f"cancel would be counted differently all at once. {_REMEDY}a ThresholdSchedule."
)

_ROUNDED_BELOW = (
    f'propagate="unclipped" passes on gradients far above the limits. {_ROUNDED}where they cancel '
    "on their way through a layer, what the rounding leaves may be as large as the limit of the "
    f'layer below, in many equal examples at once. {_REMEDY}propagate="clipped" or '
    'allocation="joint".'
)


_ROUNDED_WHITENED = (
    f"whitening scales up what is small in the gradients' sum. {_ROUNDED}in many equal examples at "
    f"once the rounding would be scaled up to more than one example may contribute. {_REMEDY}"
    "whitening=None."
)


def rounded_mean(name: str, dtype: torch.dtype) -> str | None:
    """Check that a part of the model does not round a mean loss's gradients to low precision.

    Args:
        name: the part's name.
        dtype: the dtype that it computes in.
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
    """Check that float32 products, such as TensorFloat-32 ones, do not round a mean's gradients.

    Args:
        device: the model's device.
        kinds: the kinds of products that the model computes, see `kinds_of_products`.
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
        'loss_reduction="sum", or set the two options to "highest" and "ieee".'
    )


def kinds_of_products(parameters: Iterable[Tensor]) -> tuple[str, ...]:
    """Return the kinds of products in a model; a parameter of three axes may be a kernel."""
    return ("matmul", "conv") if any(p.dim() > 2 for p in parameters) else ("matmul",)


def backward_under_autocast(*, compiled: bool) -> str:
    """Return the message for a backward pass under autocast.

    Args:
        compiled: whether the pass runs in a compiled graph, where autocast also makes the sums
            over the batch.
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
    """Return the message for a compiled layer that would add gradients up in low precision."""
    return (
        f"{layer.name}'s forward converts numbers to {dtype}, so in a compiled graph the sum of "
        "its per-example gradients would be rounded by more than one example's contribution. "
        "Compute in the parameters' dtype there, and use autocast around the model, or train "
        "without torch.compile."
    )


class Roundings:
    """Finds where a mean loss's gradients are rounded: in the model, or in the loss.

    Args:
        parameters: the trainable parameters.

    Attributes:
        option: why an option needs double precision, see `rounded_option`; ``None`` if none does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.option: str | None = None
        self._looks = 0  # how many gradients were read, which stalls an accelerator
        self._parameters = parameters
        self._kinds = kinds_of_products(parameters)

    def of_parameters(self) -> str | None:
        """Check the model's products, as `rounded_products` does, and its parameters' dtype.

        Both may have been changed since make_private.
        """
        if not self._parameters:
            return None
        if self.option is not None and _any_single(self._parameters):
            return self.option
        return rounded_products(self._parameters[0].device, self._kinds)

    def of_part(self, name: str, dtype: torch.dtype, *, mean: bool) -> str | None:
        """Check the dtype that a part of the model computes in; see `unfit`."""
        return unfit(name, dtype, mean=mean) or (self.option if _is_single(dtype) else None)

    def of_model(self, output: object) -> str | None:
        """Check the graph behind a model's output, as `rounded_mean` does.

        Args:
            output: the model's output, a tensor or any structure of tensors.
        """
        nodes = [x.grad_fn for x in _tensors_of(output)]
        # The scopes' counts of uses are single numbers, which no example has.
        if self.option and low_precision_behind(nodes, is_low=_is_single, scalars=False):
            return self.option
        dtype = low_precision_behind(nodes)
        return rounded_mean("A part of the model", dtype) if dtype else None

    def watch(self, output: object, rows: int, fail: Callable[[str], object]) -> None:
        """Check the gradients that the loss sends to the model's outputs.

        Args:
            output: the model's output.
            rows: the batch's size.
            fail: called with the error message; raises.
        """
        if rows & (rows - 1) == 0:
            return  # A power of two: division by it rounds nothing.
        for x in _tensors_of(output):
            if x.requires_grad and (x.device.type == "cpu" or self._looks < _LOOKS):
                x.register_hook(partial(self._look, fail))

    def _look(self, fail: Callable[[str], object], gradient: Tensor) -> None:
        self._looks += 1
        few = gradient.detach().flatten()[:_ENTRIES]
        # Quotients in double precision with 29 zero bits at their end were rounded to float32.
        double = self.option is not None and gradient.dtype == torch.float64
        if double and bool((few.float() == few).all()) and bool(few.any()):
            fail(self.option or "")
        # Many different float32 numbers that all end in 16 zero bits were rounded to bfloat16.
        # A few may end so by nature: signs, counts, or the rest where others cancel.
        if bool((few.bfloat16() == few).all()) and len(few.unique()) >= _DIFFERENT:
            fail(rounded_mean("The loss", torch.bfloat16) or "")


# The number of gradients read on an accelerator, the entries read of each, and how many different
# values among them are enough to tell rounded numbers from a few round ones.
_LOOKS = 4
_ENTRIES = 1024
_DIFFERENT = 64


def _tensors_of(output: object) -> list[Tensor]:
    leaves = [x.data if is_packed(x) else x for x in batch_leaves(output)]
    return [x for x in leaves if isinstance(x, Tensor)]
