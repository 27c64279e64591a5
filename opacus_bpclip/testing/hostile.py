"""Batches made to break a bound, with examples of very different kinds and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from opacus_bpclip.testing.layer import ClippedLayer, Inputs, MakeInputs, each

_SCALES = (1e-30, 1e-3, 1.0, 1e3, 1e30)
# Kinds of inputs and upstream gradients: noise, a single entry, equal entries, zeros.
_KINDS = ("normal", "normal", "spike", "constant", "zero")

T = TypeVar("T")


def hostile(layer: ClippedLayer, inputs: MakeInputs, count: int) -> tuple[Inputs, Tensor]:
    """Return arguments and an upstream gradient; each example has its own kind and size."""
    arguments = layer.make(inputs, count)
    upstream = layer.upstream(arguments)
    kinds = [(_drawn(_KINDS), _drawn(_KINDS)) for _ in range(count)]
    # Half of the examples have the same kind in both, since some violations need that.
    kinds = [(x, x if torch.rand(()) < 0.5 else g) for x, g in kinds]
    spoil = partial(_spoilt, axis=layer.axis)
    arguments = each(arguments, lambda x: spoil(x, kinds=[kind for kind, _ in kinds]))
    return arguments, spoil(upstream, kinds=[kind for _, kind in kinds])


def _spoilt(x: Tensor, kinds: Sequence[str], axis: int) -> Tensor:
    if not x.is_floating_point():
        return x
    x = x.clone()
    largest = torch.finfo(x.dtype).max ** 0.4
    for i, kind in enumerate(kinds):
        row = x.select(axis, i)
        row.copy_(shaped(row, kind) * min(_drawn(_SCALES), largest))
    return x


def shaped(x: Tensor, kind: str) -> Tensor:
    """Return a tensor of the same shape and of the given kind; ``x`` itself for "normal"."""
    if kind == "normal":
        return x
    if kind == "spike":
        spike = torch.zeros(x.shape, dtype=x.dtype)
        spike.view(-1)[torch.randint(x.numel(), ())] = 1
        return spike
    return torch.full(x.shape, float(kind == "constant"), dtype=x.dtype)


def _drawn(values: Sequence[T]) -> T:
    return values[int(torch.randint(len(values), ()))]
