"""The search for coupled examples leaves no trace: neither in the model nor in training."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip.probe import UntriedError
from tests.budgets import layerwise
from tests.helpers import FEATURES, batch, loss_of, make_private, mlp, summed
from tests.probing import Middle, found


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 2))
    model[3].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert found(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_error_in_the_model_leaves_nothing_behind_either() -> None:
    def fail(h: Tensor) -> Tensor:
        raise KeyError("not today")

    model, state = Middle(fail), torch.get_rng_state()
    with pytest.raises(UntriedError, match=r"^KeyError: 'not today'$"):
        found(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_training_is_the_same_with_the_search_and_without() -> None:
    gradients = []
    for probe in (True, False):
        torch.manual_seed(3)
        private = make_private(mlp(), backprop=layerwise(probe=probe))
        loss_of(private.model, *batch()).backward()
        private.optimizer.step()
        gradients.append((summed(private), torch.rand(1)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
