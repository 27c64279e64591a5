"""Killers of mutants of the replacements: each is compared with what it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from opacus_bpclip import CoverageError, PrivacyEngine
from opacus_bpclip.replacements.attention import MultiheadAttention
from opacus_bpclip.replacements.base import Copies
from tests.companions import check_attention


def _replaced(model: nn.Module) -> nn.Module:
    """Have a refusal count as a failed check."""
    try:
        return PrivacyEngine.get_compatible_module(model, clipping="backprop")
    except CoverageError as error:
        raise AssertionError(f"refused: {error}") from error


def attention_with_masks() -> None:
    """Attention to other sequences, with every mask, compared by `get_compatible_module`."""
    _replaced(nn.ModuleDict({"body": nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True)}))


def saturated_attention() -> None:
    """Attention of which one key has all, in a batch of 101 of which all but one are equal."""
    check_attention(nn.TransformerEncoderLayer, 1e4, 100, alike=True, reduction="mean")


def network_with_dropout() -> None:
    """A recurrent network of two layers with dropout, both directions."""
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5, bidirectional=True)
    _replaced(nn.ModuleDict({"body": module}))


def normalised_vectors() -> None:
    """A normalisation of eight features, of vectors, where every group has all of them."""
    _replaced(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))


def frozen_normalisation() -> None:
    """A frozen normalisation, in a model that is put into training mode."""
    frozen = nn.BatchNorm1d(4).requires_grad_(False)
    made = _replaced(nn.Sequential(nn.Linear(4, 4), frozen)).train()
    x = torch.randn(4, 4)
    apart = (made(x)[:2] - made(x[:2])).abs().max()
    assert apart < 1e-5, f"companions change an example's value by {apart}"


def attention_that_is_wrong() -> None:
    """An attention whose heads are cut differently must not pass for what it replaces."""
    of: Callable[[nn.MultiheadAttention, Copies], MultiheadAttention] = MultiheadAttention.of

    def wrong(module: nn.MultiheadAttention, copies: Copies) -> MultiheadAttention:
        made = of(module, copies)
        made.num_heads, made.head_dim = 1, made.embed_dim
        return made

    MultiheadAttention.of = wrong  # type: ignore[assignment]
    try:
        PrivacyEngine.get_compatible_module(nn.MultiheadAttention(4, 2), clipping="backprop")
    except CoverageError:
        return
    finally:
        MultiheadAttention.of = of  # type: ignore[method-assign]
    raise AssertionError("a replacement that computes something else was returned")
