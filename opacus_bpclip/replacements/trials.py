"""The made-up calls on which replacements are compared with the originals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_bpclip.replacements.verify import Call

_BATCH, _STEPS = 2, 3
_LENGTHS = [2, 3]  # lengths of packed sequences; the shortest first, so that packing sorts them

_AXES = {1: (nn.BatchNorm1d, nn.InstanceNorm1d), 3: (nn.BatchNorm3d, nn.InstanceNorm3d)}

_CAUSAL, _MEAN = "is_causal", "mean weights"
_ASKED: Mapping[str, Mapping[str, bool]] = {
    "no weights": {"need_weights": False},
    _MEAN: {"need_weights": True},
    "each head's weights": {"need_weights": True, "average_attn_weights": False},
}


def attention_calls(module: nn.MultiheadAttention, generator: torch.Generator) -> Iterator[Call]:
    """Yield calls with every kind of mask that ``nn.MultiheadAttention`` accepts.

    Args:
        module: the module to replace; its widths, heads and layout are read.
        generator: draws inputs and masks.
    """
    for sources in (_STEPS, _STEPS + 1):
        shapes = [(_STEPS, module.embed_dim), (sources, module.kdim), (sources, module.vdim)]
        inputs = [_normal(generator, _BATCH, *shape) for shape in shapes]
        if not module.batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        paddings = _paddings(sources)
        masks = _masks(module.num_heads, sources, generator)
        for padding, mask, asked in product(paddings, masks, _ASKED):
            # A causal mask is square. The other masks are tried with different numbers of queries
            # and keys, which shows whether axes are confused.
            if ((sources == _STEPS) != (mask == _CAUSAL)) or (asked == _MEAN and mask != _CAUSAL):
                continue
            options = {**paddings[padding], **masks[mask], **_ASKED[asked]}
            name = f"with {padding}, {mask}, {asked}, {_STEPS} queries, {sources} keys"
            yield name, partial(_call, args=inputs, options=options)
    alone = [_normal(generator, *shape) for shape in shapes]
    yield "for one example without a batch axis", partial(_call, args=alone, options={})


def recurrent_calls(module: nn.RNNBase, generator: torch.Generator) -> Iterator[Call]:
    """Yield calls with and without an initial state, on batches, packed batches, one example.

    Args:
        module: the module to replace; its widths, layers and layout are read.
        generator: draws inputs and states.
    """
    layers = module.num_layers * (1 + module.bidirectional)
    shape = (layers, _BATCH, module.hidden_size)
    x = _normal(generator, _BATCH, _STEPS, module.input_size)
    x = x if module.batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(
        x, torch.tensor(_LENGTHS), batch_first=module.batch_first, enforce_sorted=False
    )
    h, c = _normal(generator, *shape), _normal(generator, *shape)
    lstm = isinstance(module, nn.LSTM)
    batch, alone = ((h, c), (h[:, 0], c[:, 0])) if lstm else (h, h[:, 0])
    for text, value, state in (
        ("a batch", x, batch),
        ("a packed batch", packed, batch),
        ("one example without a batch axis", x[0] if module.batch_first else x[:, 0], alone),
    ):
        yield f"for {text}", partial(_call, args=[value], options={})
        yield f"for {text} and a state", partial(_call, args=[value], options={"hx": state})
    yield "in training, everything dropped", partial(_call_in_training, args=[x])


def norm_calls(norm: _NormBase, generator: torch.Generator) -> Iterator[Call]:
    """Yield a call of the normalisation alone.

    Args:
        norm: a batch or instance normalisation; its number of features is read.
        generator: draws the input.
    """
    forward: Any = (_BatchNorm if isinstance(norm, _BatchNorm) else _InstanceNorm).forward
    axes = next((axes for axes, kinds in _AXES.items() if isinstance(norm, kinds)), 2)
    x = _normal(generator, 4, norm.num_features, *(3,) * axes)
    yield f"for an input of shape {tuple(x.shape)}", lambda m: forward(m, x)


def _call(module: nn.Module, *, args: list[Any], options: Mapping[str, Any]) -> Any:
    return module(*args, **options)


def _call_in_training(module: nn.Module, *, args: list[Any]) -> Any:
    """Call in training mode with a dropout probability of 1.

    The result shows where dropout is applied, and does not depend on random numbers.
    """
    dropout, module.dropout = module.dropout, 1.0 if module.dropout else 0.0  # type: ignore[assignment]
    try:
        return module.train()(*args)
    finally:
        module.eval().dropout = dropout


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _paddings(sources: int) -> dict[str, dict[str, Tensor]]:
    hidden = torch.zeros(_BATCH, sources, dtype=torch.bool)
    hidden[0, -1] = True
    added = hidden * -2.0 + torch.arange(sources) / 2
    return {
        "no padding": {},
        "a boolean key_padding_mask": {"key_padding_mask": hidden},
        "a float key_padding_mask": {"key_padding_mask": added.double()},
    }


def _masks(heads: int, sources: int, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    causal = torch.ones(_STEPS, sources, dtype=torch.bool).triu(1)
    each = torch.rand(_BATCH * heads, _STEPS, sources, generator=generator) < 0.4
    each[..., 0] = False  # no query ignores all keys
    return {
        "no mask": {},
        "a boolean attn_mask": {"attn_mask": causal},
        _CAUSAL: {"attn_mask": causal, "is_causal": True},
        "a float attn_mask": {"attn_mask": _normal(generator, _STEPS, sources)},
        "a boolean attn_mask for each head": {"attn_mask": each},
        "a float attn_mask for each head": {
            "attn_mask": _normal(generator, _BATCH * heads, _STEPS, sources)
        },
    }
