"""What a rule is: how one layer prepares its inputs and bounds its gradient."""

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

# What a layer was called with: the first arguments of its forward, ``None`` where one was left out.
Inputs = tuple[Tensor | None, ...]


class Prepared(NamedTuple):
    """A layer's inputs as the rule lets them into the layer, batch first.

    Attributes:
        inputs: the inputs.
        norms: ``[B, R, P]``, the L2 norm of each column that enters the weight product; ``None``
            where the rule does not need them.
        finite: ``[B]`` bool, whether every number of the example is finite.
        scales: by what each input was multiplied, broadcastable over it; ``None`` for 1, empty if
            none was.
    """

    inputs: Inputs
    norms: Tensor | None
    finite: Tensor
    scales: Inputs = ()


@dataclass(frozen=True)
class Rule(ABC):
    """How the gradient of one layer's weight and bias is bounded.

    Immutable, made once from a module, and works on tensors alone, so that it can be traced.

    Attributes:
        methods: what a subclass of the layer must not override for the rule to hold.
        clips_input: whether the layer's input has a norm to clip.
        parameters: the names of the layer's parameters that the rule bounds.
        arguments: how many of the forward's first arguments the layer's gradient depends on.
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
        """Read the layer's geometry.

        Raises:
            CoverageError: the layer is of a supported class but configured beyond this rule.
        """

    @abstractmethod
    def expected_dims(self) -> tuple[int, int | None]:
        """Return the smallest and the largest number of axes of a batched first input."""

    def batch_axis(self, default: int) -> int:
        """Return which axis of inputs and output is the batch.

        Args:
            default: 0, or 1 in a model with ``batch_first=False``.
        """
        return default

    def batch_sizes(self, inputs: Inputs) -> tuple[int, ...]:
        """Return how many examples each input holds, batch first."""
        return tuple(x.shape[0] for x in inputs if x is not None)

    @abstractmethod
    def prepare(self, inputs: Inputs, max_norm: float | None) -> Prepared:
        """Measure the inputs, ``[B, ...]``, and clip them where the layer has something to clip.

        Each example's result depends on that example alone. An input may be multiplied by scales
        and shifted; in the backward pass, where autograd does not look, both are constants.

        Args:
            inputs: the layer's first `arguments` inputs.
            max_norm: largest norm of a column; ``None`` clips nothing.
        """

    def silenced(self, prepared: Prepared) -> Inputs:
        """Return the prepared inputs, with zeros for examples that are not finite."""
        keep = where_needed(prepared.finite)
        return tuple(
            x if x is None or not x.is_floating_point() else zero_rows(x, keep)
            for x in prepared.inputs
        )

    @abstractmethod
    def exact(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return the norm of each example's gradient, ``[B]``, or an upper bound on it.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
            input_norms: their norms, as `prepare` has measured them.
        """

    def weighted(self, g: Tensor, inputs: Inputs, input_norms: Tensor | None) -> Tensor:
        """Return an upper bound on the same that is cheaper; by default, the exact one.

        Args:
            g: as for `exact`.
            inputs: as for `exact`.
            input_norms: as for `exact`.
        """
        return self.exact(g, inputs, input_norms)

    def product(
        self, g: Tensor, inputs: Inputs, input_norms: Tensor | None, max_norm: float | None
    ) -> Tensor:
        """Return an upper bound that is cheaper still; by default, the weighted one.

        Args:
            g: as for `exact`.
            inputs: as for `exact`.
            input_norms: as for `exact`.
            max_norm: what the inputs' norms were clipped to.
        """
        return self.weighted(g, inputs, input_norms)

    def products(self, g: Tensor, inputs: Inputs) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return the parameters whose gradient is a product over positions, by name.

        Each as ``[B, R, C, P]`` and ``[B, R, D, P]``, whose product over ``P`` is the example's
        gradient in the shape ``[R, C, D]``. Only for speed: so the gradients of layers that share a
        parameter are measured together without being made.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
        """
        return {}

    def by_example(self, g: Tensor, inputs: Inputs) -> Mapping[str, Tensor]:
        """Return each example's gradients, ``[B, *parameter.shape]`` by name; empty if not known.

        Only for speed: so those of a layer that is used several times are added up before they are
        measured. Where a rule has none, the layer's backward pass runs once for each example.

        Args:
            g: gradient of the layer's output, batch first.
            inputs: the prepared inputs.
        """
        return {}

    def size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return what must be in the range of squares for `exact` to be right, ``[B]``.

        Args:
            g: as for `exact`.
            input_norms: as for `exact`.
        """
        return row_norms(g)

    def cheap_size(self, g: Tensor, input_norms: Tensor | None) -> Tensor:
        """Return the same for `product` and `weighted`, which may have fallen back on `exact`.

        Args:
            g: as for `exact`.
            input_norms: as for `exact`.
        """
        return self.size(g, input_norms)


def trainable(module: nn.Module, name: str) -> bool:
    """Return whether the module has a parameter of this name that requires a gradient."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """View ``[B]`` so that it broadcasts over the rows of ``like``, ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def where_needed(keep: Tensor) -> Tensor | None:
    """Return ``keep``, ``[B]`` bool, or ``None`` if no row is to be rewritten for being false."""
    # Reading a flag stalls an accelerator and breaks a traced graph: there, always rewrite.
    if torch.compiler.is_compiling() or keep.device.type != "cpu":
        return keep
    return None if bool(keep.all()) else keep


def where_finite(total: Tensor) -> Tensor | None:
    """Return which entries of ``total``, ``[B]``, are finite, in the manner of `where_needed`."""
    if torch.compiler.is_compiling() or total.device.type != "cpu":
        return total.abs() < math.inf  # half the kernels of `isfinite`
    return None if math.isfinite(float(total.sum())) else where_needed(total.isfinite())


def zero_rows(x: Tensor, keep: Tensor | None) -> Tensor:
    """Return ``x``, ``[B, ...]``, with zeros where ``keep``, from `where_needed`, is false."""
    # Not a multiplication: zero times nan is nan.
    return x if keep is None else torch.where(per_row(keep, x), x, x.new_zeros(()))
