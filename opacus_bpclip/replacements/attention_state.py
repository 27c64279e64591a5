"""Hooks that convert the state dict of this package's attention to PyTorch's, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# nn.MultiheadAttention keeps the parameters of these projections in one tensor.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# From the names in nn.MultiheadAttention's state dict to this package's.
_SEPARATE = {f"{name}_weight": f"{name}.weight" for name in PROJECTIONS}
_ADDED = {"bias_k": "added_k.bias", "bias_v": "added_v.bias"}
_LAST = ("out_proj.weight", "out_proj.bias")


def to_pytorch(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """Give a state dict the names and the order of nn.MultiheadAttention's, in place."""
    weights = [state.pop(f"{prefix}{name}.weight") for name in PROJECTIONS]
    if len({weight.shape for weight in weights}) == 1:
        state[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:
        state.update(zip((prefix + name for name in _SEPARATE), weights, strict=True))
    if f"{prefix}q_proj.bias" in state:
        biases = [state.pop(f"{prefix}{name}.bias") for name in PROJECTIONS]
        state[f"{prefix}in_proj_bias"] = torch.cat(biases)
    for theirs, ours in _ADDED.items():
        if prefix + ours in state:
            state[prefix + theirs] = state.pop(prefix + ours).view(1, 1, -1)
    for name in _LAST:
        if prefix + name in state:
            state[prefix + name] = state.pop(prefix + name)


def from_pytorch(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """Give a state dict of nn.MultiheadAttention the names of the layers here, in place."""
    for kind in ("weight", "bias"):
        packed = state.pop(f"{prefix}in_proj_{kind}", None)
        if packed is not None:
            for name, part in zip(PROJECTIONS, packed.chunk(3), strict=False):
                state[f"{prefix}{name}.{kind}"] = part
    for theirs, ours in _SEPARATE.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs)
    for theirs, ours in _ADDED.items():
        if prefix + theirs in state:
            state[prefix + ours] = state.pop(prefix + theirs).flatten()
