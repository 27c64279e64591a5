"""Opacus's attention: on which axis the layers inside have the batch."""

from __future__ import annotations

from opacus.layers import DPMultiheadAttention
from torch import nn


def attention_axes(model: nn.Module) -> dict[nn.Module, int]:
    """Return the batch axis of the projections of each `DPMultiheadAttention`.

    The module says ``batch_first`` for itself, whatever the layout of the model around it. Left out
    is a module whose forward is not Opacus's own: its layers are taken for layers of the model.
    """
    return {
        projection: 0 if attention.batch_first else 1
        for attention in model.modules()
        if isinstance(attention, DPMultiheadAttention) and _is_opacus_own(attention)
        for projection in (
            attention.qlinear,
            attention.klinear,
            attention.vlinear,
            attention.out_proj,
        )
    }


def _is_opacus_own(attention: DPMultiheadAttention) -> bool:
    forward = type(attention).forward
    return forward is DPMultiheadAttention.forward and "forward" not in vars(attention)
