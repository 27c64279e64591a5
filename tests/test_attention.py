"""Opacus's attention, whose layers have the batch where the module says, inside any model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPMultiheadAttention
from torch import Tensor, nn

from opacus_bpclip import CoverageError, PrivacyEngine
from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_training,
    joint,
    squared_loss,
)
from tests.followed import check_followed
from tests.strategies import (
    BOUNDS,
    clippings,
    seed_torch,
    sequences,
)

WIDTH, STEPS = 4, 3


class Attends(nn.Module):
    """Attention of a sequence, ``[B, T, D]``, to itself, whatever layout the attention has."""

    def __init__(self, kind: type[DPMultiheadAttention] = DPMultiheadAttention, **options) -> None:
        super().__init__()
        self.attention = kind(WIDTH, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        y, _ = self.attention(x, x, x)
        return y if self.attention.batch_first else y.transpose(0, 1)


@st.composite
def neighbours(draw):
    seed_torch(draw)
    options = ("batch_first", "bias", "add_bias_kv", "add_zero_attn")
    model = Attends(**{option: draw(st.booleans()) for option in options})
    # Neither normalised nor of any scale: attention's gradients may cancel to rounding errors. They
    # differ with the size of the batch, and would be scaled up to the limit.
    clipping = replace(draw(clippings()), normalize=False)
    trainer = Trainer(model, (STEPS, WIDTH), clipping, max_grad_norm=0.7)
    count = draw(st.integers(2, 5))  # Opacus's own attention needs an example
    return trainer, *draw(sequences(count, STEPS, WIDTH))


@given(neighbours())
def test_one_sequence_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)
    check_independence(*case)


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_batch_as_large_as_a_sequence_is_long_is_not_taken_for_one(batch_first):
    torch.manual_seed(0)
    model = Attends(batch_first=batch_first, add_bias_kv=True)
    trainer = Trainer(model, (STEPS, WIDTH), layerwise(bound="exact"))
    x = torch.randn(STEPS, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(STEPS, STEPS * WIDTH, dtype=torch.float64) * 100
    check_independence(trainer, x, target)


def test_without_clipping_the_sum_is_autograds():
    torch.manual_seed(0)
    model = Attends(add_bias_kv=True, add_zero_attn=True).double()
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(4, STEPS * WIDTH, dtype=torch.float64)
    squared_loss(model(x), target, "sum").backward()
    own = {name: p.grad.flatten() for name, p in model.named_parameters()}
    model.zero_grad()
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(model, (STEPS, WIDTH), clipping, max_grad_norm=1e9, loss=squared_loss)
    released = trainer.released(x, target)
    for name, layer in released.items():
        parts = [g for path, g in own.items() if path.rpartition(".")[0] == name]
        assert torch.allclose(layer, torch.cat(parts), rtol=1e-9, atol=1e-12)
    assert len(released) == 6


@pytest.mark.parametrize("bound", BOUNDS)
def test_attention_to_another_sequence_stays_within_its_sensitivity(bound):
    class Crosses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = DPMultiheadAttention(WIDTH, 2, kdim=2, vdim=2)

        def forward(self, x: Tensor) -> Tensor:
            queries, memory = x[:, :2].transpose(0, 1), x[..., :2].transpose(0, 1)
            return self.attention(queries, memory, memory)[0].transpose(0, 1)

    torch.manual_seed(0)
    trainer = Trainer(Crosses(), (STEPS, WIDTH), layerwise(bound=bound))
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64) * 10
    check_training(trainer, x, torch.randn(4, 2 * WIDTH, dtype=torch.float64) * 100)


@pytest.mark.parametrize("bound", BOUNDS)
def test_pytorchs_encoder_layer_trains_after_opacus_has_replaced_its_attention(bound):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)
    model = PrivacyEngine.get_compatible_module(layer)
    assert isinstance(model.self_attn, DPMultiheadAttention)
    trainer = Trainer(model, (STEPS, WIDTH), layerwise(bound=bound))
    x = torch.randn(4, STEPS, WIDTH, dtype=torch.float64)
    check_training(trainer, x, torch.randn(4, STEPS * WIDTH, dtype=torch.float64) * 100)


@pytest.mark.parametrize("count", [STEPS, 5])
@pytest.mark.parametrize("batch_first", [False, True])
def test_with_a_forward_of_ones_own_the_examples_are_found_in_either_layout(batch_first, count):
    class Own(DPMultiheadAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    torch.manual_seed(0)
    x = torch.randn(count, STEPS, WIDTH, dtype=torch.float64)
    check_followed(lambda: Attends(Own, batch_first=batch_first, add_bias_kv=True), x)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (True, r"^attention \(DPMultiheadAttention\) couples examples: .* Compute each"),
        (
            False,
            r"^attention\.out_proj\.bias, attention\.out_proj\.weight: the rows of ",
        ),
    ],
    ids=["searched", "not searched"],
)
@pytest.mark.parametrize("steps", [STEPS, 4])
def test_a_sequence_in_the_wrong_layout_is_refused(steps, probe, reason):
    class Wrong(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(CoverageError, match=reason):
        Trainer(Wrong(batch_first=False), (steps, WIDTH), layerwise(), probe=probe)


def test_one_example_reaches_every_layers_bound():
    torch.manual_seed(0)
    model = Attends(add_bias_kv=True)
    clipping = layerwise(bound="exact", normalize=True, stability=1e-30)
    trainer = Trainer(model, (STEPS, WIDTH), clipping, max_grad_norm=0.7)
    x = torch.randn(1, STEPS, WIDTH, dtype=torch.float64)
    target = torch.randn(1, STEPS * WIDTH, dtype=torch.float64)
    assert 0.999 * 0.7 <= joint(trainer.released(x, target)).norm() <= 0.7
