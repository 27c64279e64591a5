"""The replacement of attention trains privately, with every mask, inside any model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import CoverageError
from opacus_bpclip.replacements import compatible_copy
from opacus_bpclip.replacements.attention import MultiheadAttention
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint
from tests.replacements.masks import causal, padding
from tests.strategies import clippings, seed_torch, sequences

WIDTH, HEADS, STEPS = 4, 2, 3


class Attends(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **options)
        self.masks: dict[str, bool] = {}

    def forward(self, x: Tensor) -> Tensor:
        masks = {"key_padding_mask": padding(x)} if self.masks.get("padding") else {}
        if self.masks.get("causal"):
            masks["attn_mask"] = causal(x)
            masks["is_causal"] = True
        if self.masks.get("for each head"):
            masks["attn_mask"] = x.repeat_interleave(HEADS, 0)[:, :, :STEPS].sin()
        first = self.attention.batch_first
        x = x if first else x.transpose(0, 1)
        y, _ = self.attention(x, x, x, need_weights=self.masks.get("weights", False), **masks)
        return y if first else y.transpose(0, 1)


@st.composite
def neighbours(draw):
    seed_torch(draw)
    flags = ("batch_first", "bias", "add_bias_kv", "add_zero_attn")
    model = compatible_copy(Attends(**{flag: draw(st.booleans()) for flag in flags}))
    kinds = ("padding", "causal", "for each head", "weights")
    model.masks = {kind: draw(st.booleans()) for kind in kinds}
    # Not normalised: attention's gradients may cancel to rounding errors, which would be scaled up.
    clipping = replace(draw(clippings()), normalize=False)
    trainer = Trainer(model, (STEPS, WIDTH), clipping, max_grad_norm=0.7)
    count = draw(st.integers(1, 5))
    return trainer, *draw(sequences(count, STEPS, WIDTH))


@given(neighbours())
@settings(max_examples=60)
def test_one_sequence_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)
    check_independence(*case)


def test_one_example_reaches_every_layers_bound():
    torch.manual_seed(0)
    model = compatible_copy(Attends(add_bias_kv=True))
    clipping = layerwise(bound="exact", normalize=True, stability=1e-30)
    trainer = Trainer(model, (STEPS, WIDTH), clipping, max_grad_norm=0.7)
    x = torch.randn(1, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(1, STEPS * WIDTH, dtype=torch.float64)
    assert 0.999 * 0.7 <= joint(trainer.released(x, target)).norm() <= 0.7


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (True, r"^attention \(MultiheadAttention\) couples examples: .* Compute each"),
        (
            False,
            r"^attention\.out_proj\.bias, attention\.out_proj\.weight: the rows of ",
        ),
    ],
    ids=["searched", "not searched"],
)
@pytest.mark.parametrize(
    ("layout", "shape"),
    [({"batch_first": False}, (STEPS, WIDTH)), ({}, (WIDTH,))],
    ids=["the other's layout", "two axes for three"],
)
def test_attention_across_the_batch_is_refused(layout, shape, probe, reason):
    class Across(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(CoverageError, match=reason):
        Trainer(compatible_copy(Across(**layout)), shape, layerwise(), probe=probe)


def test_a_forward_of_ones_own_gets_no_credit_for_the_modules_layout():
    class Own(MultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Attends(batch_first=False)
    model.attention = Own(WIDTH, HEADS)
    trainer = Trainer(model, (STEPS, WIDTH), layerwise())
    trainer.model(torch.randn(5, STEPS, WIDTH, dtype=torch.float64))  # batch first all the same
