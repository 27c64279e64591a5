"""What a rule is: how one layer prepares its input and bounds its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self


class Prepared(NamedTuple):
    """A layer's input as the rule lets it into the layer.

    Attributes:
        x: the input.
        norms: ``[B, R, P]``, the L2 norm of each column that enters the weight product; ``None``
            where the rule does not need them.
        finite: ``[B]`` bool, whether every number of the example is finite.
    """

    x: Tensor
    norms: Tensor | None
    finite: Tensor


class Keep(NamedTuple):
    """What a bound needs of the input in the backward pass."""

    x: bool
    norms: bool


@dataclass(frozen=True)
class Rule(ABC):
    """How the gradient of one layer's weight and bias is bounded.

    Immutable, made once from a module, and works on tensors alone, so that it can be traced.

    Attributes:
        methods: what a subclass of the layer must not override for the rule to hold.
        clips_input: whether the layer's input has a norm to clip.
        parameters: the names of the layer's parameters that the rule bounds.
        weight: whether the layer has a trainable weight.
        bias: whether the layer has a trainable bias.
    """

    methods: ClassVar[tuple[str, ...]] = ("forward",)
    clips_input: ClassVar[bool] = False
    parameters: ClassVar[tuple[str, ...]] = ("weight", "bias")

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
        """Return the smallest and the largest number of axes of a batched input."""

    @abstractmethod
    def prepare(self, x: Tensor, max_norm: float | None) -> Prepared:
        """Measure the input ``x``, ``[B, ...]``, and clip it where the layer has something to clip.

        Each example's result depends on that example alone.

        Args:
            x: the layer's input.
            max_norm: largest norm of a column; ``None`` clips nothing.
        """

    @abstractmethod
    def keeps(self, kind: str) -> Keep:
        """Return what `bound` of this kind needs of the prepared input."""

    @abstractmethod
    def bound(
        self,
        kind: str,
        g: Tensor,
        x: Tensor | None,
        input_norms: Tensor | None,
        max_norm: float | None,
    ) -> Tensor:
        """Return an upper bound on the norm of each example's gradient, ``[B]``.

        Args:
            kind: ``"product"``, ``"weighted"`` or ``"exact"``.
            g: gradient of the layer's output.
            x: the prepared input, if kept.
            input_norms: its norms, if kept.
            max_norm: what the input's norms were clipped to.
        """


def trainable(module: nn.Module, name: str) -> bool:
    """Return whether the module has a parameter of this name that requires a gradient."""
    parameter = module._parameters.get(name)
    return parameter is not None and parameter.requires_grad


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """View ``[B]`` so that it broadcasts over the rows of ``like``, ``[B, ...]``."""
    return values.view(-1, *(1,) * (like.dim() - 1))
