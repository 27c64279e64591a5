"""Replacements that are not what they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from opacus_bpclip.replacements import normalization, recurrent, verify
from opacus_bpclip.replacements.attention import MultiheadAttention
from tests.mutants import replacement_killers as killers
from tests.mutants.registry import mutant

DIFFERS = r"refused: body \({kind}\): its replacement, {kind}, is not valid: .*differ by"


@mutant(killed_by=killers.attention_that_is_wrong, says="something else was returned")
def replacements_not_compared(patch: pytest.MonkeyPatch) -> None:
    """The output of a replacement is never compared with the original's: the model would learn, and
    export, another function than its author's."""
    patch.setattr(verify, "first_difference", lambda *_: None)


@mutant(killed_by=killers.attention_with_masks, says=DIFFERS.format(kind="MultiheadAttention"))
def padding_attended_to(patch: pytest.MonkeyPatch) -> None:
    """Attention leaves out the padding mask: an example's value depends on the values in its
    padding."""
    mask = MultiheadAttention._mask

    def without(
        self: MultiheadAttention, query: Tensor, padding: Tensor | None, given: Tensor | None
    ) -> Tensor | None:
        return mask(self, query, None, given)

    patch.setattr(MultiheadAttention, "_mask", without)


@mutant(killed_by=killers.saturated_attention, says="one example moved the sum by")
def attention_by_a_fused_kernel(patch: pytest.MonkeyPatch) -> None:
    """Attention without masks uses PyTorch's fused kernel. Where gradients cancel in it, their
    rounding errors depend on the batch's size, and are scaled up to whole gradients."""
    forward = MultiheadAttention.forward

    def fused(self: MultiheadAttention, *inputs: Tensor, **options: Any) -> Any:
        asked = any(value is not None and value is not False for value in options.values())
        if "need_weights" not in options or asked or inputs[0].dim() < 3 or not self.batch_first:
            return forward(self, *inputs, **options)
        heads = (
            layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in zip((self.q_proj, self.k_proj, self.v_proj), inputs, strict=True)
        )
        mixed = F.scaled_dot_product_attention(*heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None

    patch.setattr(MultiheadAttention, "forward", fused)


@mutant(killed_by=killers.network_with_dropout, says=DIFFERS.format(kind="LSTM"))
def last_layer_dropped_out(patch: pytest.MonkeyPatch) -> None:
    """A recurrent network applies dropout to its last layer's output, too, as Opacus's own does."""
    run = recurrent.Recurrent._run

    def dropped(self: recurrent.Recurrent, *given: Any) -> tuple[list[Tensor], recurrent.State]:
        steps, last = run(self, *given)
        return [torch.dropout(step, self.dropout, self.training) for step in steps], last

    patch.setattr(recurrent.Recurrent, "_run", dropped)


@mutant(killed_by=killers.normalised_vectors, says="example's gradient is")
def channels_normalised_alone(patch: pytest.MonkeyPatch) -> None:
    """Every channel is a group of its own: a vector becomes zero, and the layers below get rounding
    errors for a gradient."""
    patch.setattr(normalization, "groups_of", lambda channels: channels)


@mutant(killed_by=killers.frozen_normalisation, says="refused|companions change")
def frozen_statistics_forgotten_in_training(patch: pytest.MonkeyPatch) -> None:
    """A frozen batch normalisation changes to training mode with the model, and uses its batch's
    statistics there: examples change each other's values."""
    patch.setattr(normalization.FixedBatchNorm, "train", _train)


def _train(norm: _BatchNorm, mode: bool = True) -> nn.Module:
    return nn.Module.train(norm, mode)
