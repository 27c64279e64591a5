"""Against plain autograd: unclipped sums, and clipped ones example by example."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests import reference
from tests.budgets import layerwise
from tests.checks import Trainer, joint, squared_loss
from tests.strategies import BOUNDS, LayerCase, architectures, clippings, product_cases
from tests.whitening.helpers import matrices_of


@given(architectures(), st.sampled_from(BOUNDS[1:]), st.sampled_from(["mean", "sum"]))
def test_without_clipping_the_sum_is_autograds(case: LayerCase, bound, reduction):
    model = case.layer.double()
    x = torch.randn(4, *case.shape, dtype=torch.float64)
    target = torch.zeros(4, model(x).flatten(1).shape[1], dtype=torch.float64)
    model.zero_grad()
    squared_loss(model(x), target, "sum").backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    clipping = layerwise(bound=bound, max_input_norm=None)
    trainer = Trainer(
        model, case.shape, clipping, max_grad_norm=1e12, reduction=reduction, loss=squared_loss
    )
    assert torch.allclose(joint(trainer.released(x, target)), expected, rtol=1e-9, atol=1e-12)


@st.composite
def sequential_cases(draw):
    first = draw(product_cases)
    layer = first.layer.double()
    with torch.no_grad():
        features = layer(torch.zeros(1, *first.shape, dtype=torch.float64)).numel()
    torch.manual_seed(draw(st.integers(0, 999)))
    model = nn.Sequential(
        layer, nn.Tanh(), nn.Flatten(), nn.Linear(features, 3), nn.Tanh(), nn.Linear(3, 2)
    )
    return LayerCase(model.double(), first.shape)


@given(sequential_cases(), clippings(), st.sampled_from(["mean", "sum"]))
def test_each_contribution_is_the_examples_own_gradient_times_its_factor(case, clipping, reduction):
    x = torch.randn(3, *case.shape, dtype=torch.float64)
    target = torch.randn(3, 2, dtype=torch.float64)
    trainer = Trainer(case.layer, case.shape, clipping, max_grad_norm=0.7, reduction=reduction)
    released = trainer.released(x, target)
    alone = [trainer.released(x[i : i + 1], target[i : i + 1]) for i in range(3)]
    limits = dict(trainer.optimizer.layer_sensitivities)
    matrices = matrices_of(trainer)
    plain = trainer.model.to_standard_module()
    from opacus_bpclip import unclip_inputs

    unclip_inputs(plain)
    total = {name: torch.zeros_like(value) for name, value in released.items()}
    for i in range(3):
        seen = reference.contribution(
            plain,
            x[i : i + 1],
            target[i : i + 1],
            limits,
            clipping.bound,
            clipping.normalize,
            clipping.max_input_norm,
            joint=0.7 if clipping.allocation == "joint" else None,
            propagate=clipping.propagate,
            matrices=matrices,
        )
        for name, layer in seen.items():
            expected = layer.factor * layer.gradient
            assert torch.allclose(alone[i][name], expected, rtol=1e-6, atol=1e-12), (i, name)
            total[name] += expected
    for name, value in total.items():
        assert torch.allclose(released[name], value, rtol=1e-6, atol=1e-12), name


@pytest.mark.parametrize("bound", BOUNDS)
def test_frozen_weight_with_trainable_bias_is_bounded_by_the_bias_alone(bound):
    model = nn.Linear(3, 2).double()
    model.weight.requires_grad_(False)
    trainer = Trainer(model, (3,), layerwise(bound=bound), max_grad_norm=1.0)
    x = torch.randn(1, 3, dtype=torch.float64) * 100
    target = torch.tensor([[0.3, -0.4]], dtype=torch.float64)
    assert torch.allclose(joint(trainer.released(x, target)), target[0])
    assert model.weight.grad is None
