"""What the search for coupled examples leaves alone: examples that share a batch and no more."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.probe import Batch, randomness
from tests.helpers import FEATURES
from tests.probing import Middle, Recurrent, Returning, found, made_up
from tests.strategies import LayerCase, architectures


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(lambda h: F.dropout(h, 0.5), id="dropout"),
        pytest.param(lambda h: h + torch.randn_like(h), id="noise"),
        pytest.param(lambda h: h * torch.empty(len(h), 1).bernoulli_(0.5) / 0.5, id="drop path"),
        pytest.param(lambda h: h + random.random() + np.random.rand(), id="foreign randomness"),
        pytest.param(lambda h: h.relu_(), id="in place"),
        pytest.param(lambda h: h.view(-1, 2).tanh().view(-1, 8), id="flattened and back"),
        pytest.param(lambda h: h.T.contiguous().T, id="batch second for a while"),
        pytest.param(
            lambda h: (h[h.sum(1).argsort()], h.sum(1).argsort().argsort())[0][
                h.sum(1).argsort().argsort()
            ],
            id="sorted and unsorted",
        ),
        pytest.param(lambda h: h / h.norm(dim=1, keepdim=True), id="own norm"),
    ],
)
def test_what_each_example_does_alone_is_no_coupling(own: Callable[[Tensor], Tensor]) -> None:
    assert found(Middle(own)) is None


@pytest.mark.parametrize(
    "returned",
    [
        pytest.param(lambda y: y.unsqueeze(1).expand(-1, 5, -1).flatten(0, 1), id="batch major"),
        pytest.param(lambda y: y.unsqueeze(0).expand(5, -1, -1).flatten(0, 1), id="time major"),
        pytest.param(lambda y: y.T, id="batch second"),
        pytest.param(lambda y: (y, torch.ones(3)), id="a constant beside"),
        pytest.param(lambda y: (y, y.argmax(dim=1)), id="labels beside"),
        pytest.param(lambda y: torch.view_as_complex(torch.stack([y, y], dim=-1)), id="complex"),
        pytest.param(lambda y: y.masked_fill(y > 0, -torch.inf), id="infinite in part"),
    ],
)
def test_the_batch_is_found_wherever_it_is(returned: Callable[[Tensor], Any]) -> None:
    assert found(Returning(returned)) is None


@given(architectures())
def test_no_supported_architecture_is_taken_for_coupled(case: LayerCase) -> None:
    assert found(case.layer, made_up(torch.zeros(2, *case.shape))) is None


@pytest.mark.parametrize("margin", [1, 16])
def test_a_deep_residual_network_is_far_from_the_tolerance(
    margin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(randomness, "_UNITS", randomness._UNITS / margin)
    model = PrivacyEngine.get_compatible_module(torchvision.models.resnet18(num_classes=3))
    assert found(model, made_up(torch.zeros(2, 3, 16, 16))) is None


@pytest.mark.parametrize("coupled", [True, False])
def test_the_batch_may_be_second(coupled: bool) -> None:
    model = Recurrent(batch_first=False, coupled=coupled)
    assert bool(found(model, made_up(torch.zeros(5, 2, FEATURES), axis=1))) is coupled


@pytest.mark.parametrize("coupled", [True, False])
def test_packed_sequences_are_made_up_and_taken_apart(coupled: bool) -> None:
    packed = pack_sequence([torch.randn(n, FEATURES) for n in (5, 3, 2)])
    model = Recurrent(coupled=coupled)
    assert bool(found(model, made_up(packed))) is coupled
    assert bool(found(model, Batch((packed,), {}, 3, 0))) is coupled
