"""The interface of a rule: it prepares a layer's inputs and bounds each example's gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from opacus_bpclip.rules.norms import row_norms

# The first arguments of one call of a layer's forward; ``None`` where one was left out.
Inputs = tuple[Tensor | None, ...]


class Prepared(NamedTuple):
    """The inputs that the layer computes with, batch first, as its rule has prepared them.

    Attributes:
        inputs: the inputs, clipped where the rule clips.
        norms: ``[B, R, P]``, the L2 norms of the columns that the weight is multiplied with;
            ``None`` where the rule does not need them.
        finite: ``[B]`` bool, whether every number of the example is finite.
        scales: the factor of each input, broadcastable over it; ``None`` for 1. Empty if no input
            was scaled.
    """

    inputs: Inputs
    norms: Tensor | None
    finite: Tensor
    scales: Inputs = ()


@dataclass(frozen=True)
class Rule(ABC):
    """The closed forms of one layer: how it clips its input and bounds its gradient.

    A rule is immutable, is made once from a module, and works on tensors alone, so that
    ``torch.compile`` can trace it.

    Attributes:
        methods: the methods of the layer's class that the rule relies on. A subclass of the layer
            that overrides one of them does not get this rule.
        clips_input: whether ``max_input_norm`` applies to the layer's input.
        parameters: the names of the layer's parameters that the rule bounds.
        arguments: how many of the first arguments of ``forward`` the gradient depends on.
        weight: whether the layer has a trainable weight.
        bias: whether the layer has a trainable bias.
    """

    methods: ClassVar[tuple[str, ...]] = ("forward",)
    clips_input: ClassVar[bool] = False
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")
    arguments: ClassVar[int] = 1

    weight: bool
    bias: bool

    @classmethod
    @abstractmethod
    def from_module(cls, module: nn.Module) -> Self:
        """Make the rule from the layer's configuration.

        Raises:
            CoverageError: the layer has an option that the rule does not support.
        """

    @abstractmethod
    def expected_dims(self) -> tuple[int, int | None]:
        """Return the smallest and the largest number of axes of a batched first input.

        ``None`` for the largest means any number.
        """

    def batch_axis(self, default: int) -> int:
        """Return the axis of the inputs and the output that is the batch.

        Args:
            default: the model's batch axis: 0, or 1 with ``batch_first=False``.
        """
        return default

    def batch_sizes(self, inputs: Inputs) -> tuple[int, ...]:
        """Return the number of examples in each input, batch first."""
        return tuple(x.shape[0] for x in inputs if x is not None)

    @abstractmethod
    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Measure the inputs, ``[B, ...]``, and clip them if the rule clips inputs.

        Each example's result must depend on that example alone. The rule may scale and shift an
        input. It runs without autograd, so the backward pass treats scale and shift as constants.

        Args:
            inputs: the layer's first `arguments` inputs.
            max_norm: the largest norm of a column; ``None`` clips nothing.
        """

    def silenced(self, prepared: Prepared) -> Inputs:
        """Return the prepared inputs, with zeros in the rows of examples that are not finite."""
        keep = where_needed(prepared.finite)
        return tuple(
            x if x is None or not x.is_floating_point() else zero_rows(x, keep)
            for x in prepared.inputs
        )

    @abstractmethod
    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of each example's gradient, or an upper bound on it. ``[B]``.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            input_norms: the columns' norms from `prepare`, ``[B, R, P]`` or ``None``.
        """

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the bound of ``bound="weighted"``, ``[B]``; `exact` unless overridden.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            input_norms: the columns' norms from `prepare`, ``[B, R, P]`` or ``None``.
        """
        return self.exact(g, inputs, input_norms)

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return the bound of ``bound="product"``, ``[B]``; `weighted` unless overridden.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            input_norms: the columns' norms from `prepare`, ``[B, R, P]`` or ``None``.
            max_norm: the norm that the columns were clipped to; ``None`` if they were not.
        """
        return self.weighted(g, inputs, input_norms)

    def products(self, g: Tensor, inputs: Inputs) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return, by name, the factors of the parameters' gradients that are matrix products.

        Two tensors ``[B, R, C, P]`` and ``[B, R, D, P]``: their product over ``P`` is the example's
        gradient, in the shape ``[R, C, D]``. Optional, for speed: layers that share a parameter
        then get the norm of their summed gradient without building it.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
        """
        return {}

    def by_example(self, g: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return the per-example gradients by name, ``[B, *parameter.shape]``; empty if not known.

        Optional, for speed: the gradients of a layer that is used several times are added before
        they are measured. Without this method, the layer's backward pass runs once per example.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
        """
        return {}

    def size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return, for each example, an upper bound on the numbers that `exact` squares. ``[B]``.

        If its square overflows, `exact` cannot be trusted and the example contributes zero.

        Args:
            g: gradient of the layer's output, batch first.
            input_norms: the columns' norms from `prepare`, ``[B, R, P]`` or ``None``.
        """
        return row_norms(g)

    def cheap_size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return `size` for `product` and `weighted`, which may fall back on `exact`.

        Args:
            g: gradient of the layer's output, batch first.
            input_norms: the columns' norms from `prepare`, ``[B, R, P]`` or ``None``.
        """
        return self.size(g, input_norms)


def trainable(module: nn.Module, name: str) -> bool:
    """Return whether the module has a parameter of this name that requires a gradient."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """View ``values``, ``[B]``, so that it broadcasts over the rows of ``like``, ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def where_needed(keep: Tensor) -> Tensor | None:
    """Return ``keep``, ``[B]`` bool, or ``None`` if it is known that every row is kept."""
    # Reading the flags would stall an accelerator and break a traced graph.
    if torch.compiler.is_compiling() or keep.device.type != "cpu":
        return keep
    return None if bool(keep.all()) else keep


def where_finite(total: Tensor) -> Tensor | None:
    """Return which entries of ``total``, ``[B]``, are finite; ``None`` if all are known to be."""
    if torch.compiler.is_compiling() or total.device.type != "cpu":
        return total.abs() < math.inf  # half the kernels of `isfinite`
    return None if math.isfinite(float(total.sum())) else where_needed(total.isfinite())


def zero_rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``x``, ``[B, ...]``, with zeros in the rows where ``keep`` is false."""
    # Not a multiplication: zero times nan is nan.
    return x if keep is None else torch.where(per_row(keep, x), x, x.new_zeros(()))
