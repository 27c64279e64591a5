"""The interface of a use: it bounds each example's gradient, and sums them with given factors."""

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
    """Returns the factors for the measurement of a use, of all its examples or of some."""

    def __call__(self, found: Measured, rows: slice = ALL) -> Factors:
        """Return the factors for the measurement of these rows."""


class Clipped(NamedTuple):
    """The result of clipping a use by itself.

    Attributes:
        sums: the sums of the examples' clipped gradients, by the parameter's name in the layer.
        inputs: the clipped gradients of the layer's inputs; ``None`` for inputs without one.
    """

    sums: Sums
    inputs: tuple[Tensor | None, ...]


class Use(ABC):
    """One call of a layer, with the upstream gradient that has arrived at it.

    Attributes:
        layer: the layer.
        examples: the number that a mean loss has divided the upstream gradient by; 1 for a sum.
        reads_parameters: whether `sums` reads the parameters' values.
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
        """Bound the norm of each example's gradient, still divided by `examples`."""

    @abstractmethod
    def sums(self, factors: Factors) -> Sums:
        """Return the sums of the examples' gradients times ``factors`` and `examples`.

        It is called after all other methods.
        """

    @abstractmethod
    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the layer's inputs.

        Args:
            factors: the examples' factors; ``None`` for 1.
        """

    @abstractmethod
    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples, each ``[b, *parameter.shape]``."""

    def in_order(self) -> Use:
        """Return the use with example ``i`` in row ``i``, without gradients of its inputs."""
        return self

    def has_changed(self) -> bool:
        """Return whether a tensor that `sums` reads was changed in place since the measurement."""
        return False

    def matrices(self, rows: slice) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Return, by name, the factors of the gradients that are matrix products.

        Two tensors ``[b, R, C, P]`` and ``[b, R, D, P]``: their product over ``P`` is the example's
        gradient, in the shape ``[R, C, D]``.
        """
        return {}

    def clip(self, factors_of: FactorsOf) -> Clipped:
        """Clip this use by itself.

        Args:
            factors_of: returns the factors for the measured bounds.
        """
        factors = factors_of(self.measure())
        return Clipped(self.sums(factors), self.input_gradients(factors))


class OwnUse(Use):
    """A use with per-example gradients.

    Args:
        layer: the layer.
        examples: the number that a mean loss has divided the upstream gradient by; 1 for a sum.
        own: ``[B, K]``, the gradients of the parameters, flattened and concatenated.
        names: the names of these parameters.
        size: ``[B]``, numbers that must be in range for the norms to be right; ``None`` for the
            norms themselves.
        cancellation: ``[B]``, factors that suppress rounding errors, from `cancellation_factor`.
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
        cancellation: Tensor | None = None,
        inputs: tuple[Tensor | None, ...] = (),
    ) -> None:
        self.layer, self.examples = layer, examples
        self._own, self._names, self._inputs = own, names, inputs
        self._size, self._cancellation = size, cancellation

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the gradients."""
        return self._own.dtype

    def measure(self) -> Measured:
        """Return the norms of the per-example gradients."""
        bound = row_norms(self._own)
        if self._cancellation is not None:
            bound = bound * self._cancellation
        size = self._size
        return measured(
            bound, None, size=None if size is None else lambda: size, examples=self.examples
        )

    def sums(self, factors: Factors) -> Sums:
        """Return the sums of the gradients times their factors."""
        by = factors.factor
        if self._cancellation is not None:
            by = by * self._cancellation.to(by.dtype)
        total = by @ zero_rows(self._own, factors.keep)
        return self._split(total * self.examples)

    def input_gradients(self, factors: Factors | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs that the caller has computed."""
        if factors is None:
            return self._inputs
        by, keep = factors
        return tuple(
            None if dx is None else zero_rows(dx.mul_(_over(by, dx)), keep) for dx in self._inputs
        )

    def own(self, rows: slice) -> Sums:
        """Return the gradients of some examples."""
        own = self._own[rows]
        if self._cancellation is not None:
            own = own * self._cancellation[rows].to(own.dtype)[:, None]
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
