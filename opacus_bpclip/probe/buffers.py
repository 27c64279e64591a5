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
        name: [x.clone() if copied else x for x in _numbers(buffer.detach())]
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


def _numbers(buffer: Tensor) -> list[Tensor]:
    """Return dense tensors of real numbers that say all about a buffer."""
    if buffer.layout is torch.sparse_coo:
        buffer = buffer.coalesce()
        return [buffer.indices(), *_numbers(buffer.values())]
    if buffer.layout is not torch.strided:
        return _numbers(buffer.to_sparse_coo())
    if buffer.is_quantized:
        return [buffer.dequantize()]
    return [torch.view_as_real(buffer) if buffer.is_complex() else buffer]
