"""Find the batch axis of the layers inside attention and PyTorch's transformer layers.

These modules have a ``batch_first`` of their own, whatever the layout of the model around them.
"""

from __future__ import annotations

from collections.abc import Iterator

from opacus.layers import DPMultiheadAttention
from torch import nn

from opacus_bpclip.replacements.attention import MultiheadAttention

# Opacus's attention calls its layers in its own layout; this package's always batch first.
_PROJECTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    DPMultiheadAttention: ("qlinear", "klinear", "vlinear", "out_proj"),
    MultiheadAttention: ("q_proj", "k_proj", "v_proj", "out_proj"),
}
# The layers of PyTorch's transformer classes, and the methods that call them. Their layout is that
# of the first attention inside.
_PARTS: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    nn.TransformerEncoderLayer: (
        ("norm1", "norm2", "linear1", "linear2"),
        ("forward", "_sa_block", "_ff_block"),
    ),
    nn.TransformerDecoderLayer: (
        ("norm1", "norm2", "norm3", "linear1", "linear2"),
        ("forward", "_sa_block", "_mha_block", "_ff_block"),
    ),
    nn.TransformerEncoder: (("norm",), ("forward",)),
    nn.TransformerDecoder: (("norm",), ("forward",)),
}


def attention_axes(model: nn.Module) -> dict[nn.Module, int]:
    """Return the batch axis of the layers inside attention and PyTorch's transformers.

    A module that overrides one of the known methods is left out: its layers get the batch axis of
    the model.
    """
    return dict(_axes(model))


def _axes(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for module in model.modules():
        for kind, projections in _PROJECTIONS.items():
            if isinstance(module, kind) and _runs(module, kind, ("forward",)):
                ours = kind is MultiheadAttention
                axis = 0 if ours or module.batch_first else 1
                yield from ((module.get_submodule(name), axis) for name in projections)
        for kind, (parts, methods) in _PARTS.items():
            attention = _first_attention(module)
            if isinstance(module, kind) and _runs(module, kind, methods) and attention:
                axis = 0 if attention.batch_first else 1
                layers = (module._modules.get(name) for name in parts)
                yield from ((layer, axis) for layer in layers if layer is not None)


def _first_attention(module: nn.Module) -> nn.Module | None:
    attentions = (part for part in module.modules() if isinstance(part, tuple(_PROJECTIONS)))
    return next(attentions, None)


def _runs(module: nn.Module, kind: type[nn.Module], methods: tuple[str, ...]) -> bool:
    return all(
        getattr(type(module), method) is getattr(kind, method) and method not in vars(module)
        for method in methods
    )
