"""One use of a layer, as the backward pass sees it: how large, and the sum with given factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opacus_bpclip.clipping.factors import Factors, Measured, measured
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules.base import zero_rows
from opacus_bpclip.rules.norms import row_norms

Sums = Mapping[str, Tensor]
ALL = slice(None)


class FactorsOf(Protocol):
    """Returns the factors for what was measured of a use, of all its examples or of some."""

    def __call__(self, found: Measured, rows: slice = ALL) -> Factors:
        """Return them for what was measured of these rows."""


class Clipped(NamedTuple):
    """What becomes of a use that is clipped by itself.

    Attributes:
        sums: of the examples' clipped gradients, by the parameter's name in the layer.
        inputs: the gradients of the layer's inputs, clipped; ``None`` for those without.
    """

    sums: Sums
    inputs: tuple[Tensor | None, ...]


class Use(ABC):
    """A call of a layer, and the upstream gradient that has arrived at it.

    Attributes:
        layer: the layer.
        examples: by what a mean loss has divided the upstream gradient; 1 for a sum.
        reads_parameters: whether the sum depends on the parameters' values.
    """

    layer: Layer
    examples: int
    reads_parameters = True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""

    @abstractmethod
    def measure(self) -> Measured:
        """Bound the norm of each example's gradient, as divided by `examples`."""

    @abstractmethod
    def sums(self, factors: Factors) -> Sums:
        """Return the sum of the examples' gradients times ``factors`` and `examples`.

        The last thing that a use is asked for.
        """

    @abstractmethod
    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the layer's inputs.

        Args:
            factors: by what to multiply each example's; ``None`` for 1.
        """

    @abstractmethod
    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples, each ``[b, *parameter.shape]``."""

    def in_order(self) -> Use:
        """Return the use with example ``i`` in row ``i``; its inputs' gradients are made."""
        return self

    def has_changed(self) -> bool:
        """Return whether somebody has changed what is kept, after it was measured."""
        return False

    def matrices(self, rows: slice) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return parameters whose gradients are products: ``[b, R, C, P]`` and ``[b, R, D, P]``.

        The gradient is their product over ``P``, in the shape ``[R, C, D]``.
        """
        return {}

    def clip(self, factors_of: FactorsOf) -> Clipped:
        """Clip this use by itself.

        Args:
            factors_of: returns the factors for what was measured.
        """
        factors = factors_of(self.measure())
        return Clipped(self.sums(factors), self.input_gradients(factors))


class OwnUse(Use):
    """A use whose examples' gradients are at hand.

    Args:
        layer: the layer.
        examples: as the attribute.
        own: ``[B, K]``, the gradients of the parameters, one after the other.
        names: of the parameters.
        size: as for `measured`.
        part: ``[B]``, by what to multiply each example's gradient beforehand.
        inputs: the gradients of the layer's inputs; may be changed in place.
    """

    reads_parameters = False

    def __init__(
        self,
        layer: Layer,
        examples: int,
        own: Tensor,
        names: Sequence[str],
        *,
        size: Tensor | None = None,
        part: Tensor | None = None,
        inputs: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.layer, self.examples = layer, examples
        self._own, self._names, self._inputs = own, names, inputs
        self._size, self._part = size, part

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""
        return self._own.dtype

    def measure(self) -> Measured:
        """Return the norm of the gradients."""
        bound = row_norms(self._own)
        if self._part is not None:
            bound = bound * self._part
        size = self._size
        return measured(
            bound, None, size=None if size is None else lambda: size, examples=self.examples
        )

    def sums(self, factors: Factors) -> Sums:
        """Multiply the factors with the gradients."""
        by = factors.factor
        if self._part is not None:
            by = by * self._part.to(by.dtype)
        total = by @ zero_rows(self._own, factors.keep)
        return self._split(total * self.examples)

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Return the gradients that came with the parameters' own."""
        if factors is None:
            return self._inputs
        by, keep = factors
        return tuple(
            None if dx is None else zero_rows(dx.mul_(_over(by, dx)), keep) for dx in self._inputs
        )

    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples."""
        own = self._own[rows]
        if self._part is not None:
            own = own * self._part[rows].to(own.dtype)[:, None]
        return self._split(own)

    def _split(self, joint: Tensor) -> Sums:
        shapes = [self.layer.named_parameters[name].shape for name in self._names]
        parts = joint.split([shape.numel() for shape in shapes], dim=-1)
        return {
            name: part.reshape(*joint.shape[:-1], *shape)
            for name, part, shape in zip(self._names, parts, shapes, strict=True)
        }


def _over(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))
