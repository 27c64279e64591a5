"""What keeps the examples in their order is accepted, on whatever axis the batch is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn

from opacus_bpclip import PrivacyEngine
from tests.helpers import CLASSES, FEATURES
from tests.order_models import STEPS, refusal
from tests.probing import Middle, made_up


class Attentive(nn.Module):
    """Attention and a layer, sequence first inside a model that has the batch first."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention, self.head = attention, nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.head(self.attention(x, x, x)[0].transpose(0, 1))


@pytest.mark.parametrize("steps", [2, 4, 6])  # also as many as there are examples
@pytest.mark.parametrize("batch_first", [True, False])
def test_the_batch_may_be_on_another_axis(batch_first: bool, steps: int) -> None:
    attention = DPMultiheadAttention(FEATURES, 2)
    assert refusal(Attentive(attention), made_up(torch.zeros(2, steps, FEATURES))) is None
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 8, batch_first=batch_first)
    made = PrivacyEngine.get_compatible_module(layer, clipping="backprop")
    x = torch.zeros(2, steps, FEATURES) if batch_first else torch.zeros(steps, 2, FEATURES)
    assert refusal(made, made_up(x, axis=0 if batch_first else 1)) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_a_flip_on_another_axis_is_found_where_the_batch_is(axis: int) -> None:
    class Flipped(nn.Module):
        def __init__(self, over: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)
            self.over = over

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).flip(self.over)).flip(self.over)

    shape = (2, STEPS, FEATURES) if axis == 0 else (STEPS, 2, FEATURES)
    batch = made_up(torch.zeros(shape), axis=axis)
    assert refusal(Flipped(axis), batch)
    assert refusal(Flipped(1 - axis), batch) is None  # a sequence read from its end


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [DPLSTM, DPGRU])
def test_recurrent_networks_keep_the_order(kind: Any, batch_first: bool) -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(FEATURES, 5, 2, batch_first=batch_first, bidirectional=True)
            self.head = nn.Linear(10, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    x = torch.zeros(2, STEPS, FEATURES) if batch_first else torch.zeros(STEPS, 2, FEATURES)
    assert refusal(Reading(), made_up(x, axis=0 if batch_first else 1)) is None


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda h: h.relu_(), id="in place"),
        pytest.param(lambda h: nn.functional.dropout(h, 0.5), id="dropout"),
        pytest.param(lambda h: h.T.contiguous().T, id="batch second for a while"),
        pytest.param(lambda h: h.flip(1), id="features turned round"),
        pytest.param(lambda h: h[h[:, 0].argsort()][h[:, 0].argsort().argsort()], id="and back"),
        pytest.param(torch.zeros_like, id="nothing"),
    ],
)
def test_what_keeps_the_order_is_accepted(function: Callable[[Tensor], Tensor]) -> None:
    assert refusal(Middle(function)) is None


def test_a_convolutional_network_is_accepted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    )
    assert refusal(model, made_up(torch.zeros(2, 3, 8, 8))) is None
