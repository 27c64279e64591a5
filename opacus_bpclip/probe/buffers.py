"""The buffers of a model, and which of them two runs have left different."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from opacus_bpclip.probe.comparison import equal

# The numbers in each buffer, by the buffer's name.
Buffers = Mapping[str, list[Tensor]]


def buffers_of(model: nn.Module, *, copied: bool = False) -> Buffers:
    """Return the buffers of a model, persistent or not.

    Args:
        model: the model.
        copied: return copies, which later runs do not change.
    """
    return {
        name: [x.clone() if copied else x for x in numbers(buffer)]
        for name, buffer in model.named_buffers()
    }


def persistent(model: nn.Module) -> set[str]:
    """Return the names of the buffers that are in the model's ``state_dict``."""
    kept = {id(value) for value in model.state_dict(keep_vars=True).values()}
    return {name for name, buffer in model.named_buffers() if id(buffer) in kept}


def differing(ours: Buffers, theirs: Buffers, tolerance: float = 0.0) -> list[str]:
    """Return the names of the buffers that differ, or that only one side has."""
    return [
        name
        for name in dict.fromkeys((*ours, *theirs))
        if not equal(ours.get(name, []), theirs.get(name, []), tolerance)
    ]


def numbers(tensor: Tensor) -> list[Tensor]:
    """Return dense tensors of real numbers that say all about a tensor.

    There are none for a kind of tensor that has no such form: two of that kind are not told apart.
    """
    try:
        return _numbers(tensor.detach())
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return []


def _numbers(tensor: Tensor) -> list[Tensor]:
    if tensor.is_nested:
        return [part for row in tensor.unbind() for part in _numbers(row)]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), *_numbers(tensor.values())]
    if tensor.layout is not torch.strided:
        return _numbers(tensor.to_sparse_coo())
    if tensor.is_quantized:
        return [tensor.dequantize()]
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor]
