"""The node that replaces a layer computes what clipping around the layer computes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip.clipping import attach as layer_clips
from opacus_bpclip.rules import GroupNormRule, LayerNormRule
from tests.budgets import layerwise
from tests.checks import Trainer, joint
from tests.strategies import MODES, norm_cases, product_cases, seeds


def _both_ways(layer, shape, clipping, x, target):
    """Return output and sum by the node, and by autograd between two clips."""
    found = []
    for nodes in (layer_clips.CLOSED_FORMS, {}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_clips, "CLOSED_FORMS", nodes)
            trainer = Trainer(copy.deepcopy(layer), shape, clipping, max_grad_norm=0.7)
            found.append((trainer.model(x).detach(), joint(trainer.released(x, target))))
    return found


@given(
    product_cases,
    seeds,
    st.sampled_from(MODES),
    st.sampled_from([0.1, 3.0, 100.0]),
    st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_a_weight_products_node_does_what_its_clips_do(case, seed, mode, max_input_norm, scale):
    torch.manual_seed(seed)
    layer = case.layer.double()
    x = torch.randn(4, *case.shape, dtype=torch.float64) * scale
    target = torch.randn(4, layer(x).flatten(1).shape[1], dtype=torch.float64) * scale
    bound, normalize = mode
    clipping = layerwise(bound=bound, normalize=normalize, max_input_norm=max_input_norm)
    node, around = _both_ways(layer, case.shape, clipping, x, target)
    for one, other in zip(node, around, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@given(norm_cases(), seeds, st.sampled_from([False, True]))
def test_a_normalisations_node_does_what_its_clips_do_with_the_exact_bound(case, seed, normalize):
    torch.manual_seed(seed)
    layer = case.layer.double()
    x = torch.randn(4, *case.shape, dtype=torch.float64)
    target = torch.randn(4, layer(x).flatten(1).shape[1], dtype=torch.float64)
    clipping = layerwise(bound="exact", normalize=normalize)
    node, around = _both_ways(layer, case.shape, clipping, x, target)
    for one, other in zip(node, around, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("wants_input", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.GroupNorm(2, 6), (4, 6)),
        (nn.GroupNorm(3, 6), (4, 6, 3, 2)),
        (nn.InstanceNorm1d(6, affine=True), (4, 6, 5)),
        (nn.GroupNorm(2, 6), (0, 6, 3)),
    ],
)
def test_a_group_norm_tells_examples_apart(
    layer, shape, trained, wants_input, compiling, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double()
    nn.init.normal_(layer.weight)
    x, g = torch.randn(2, *shape, dtype=torch.float64)
    x[1:2, 0] = torch.nan  # must not affect other examples
    rule = GroupNormRule.from_module(layer)
    dx, own = rule.gradients(g, x, layer.weight.detach(), wanted=(wants_input, *trained))
    assert (dx is not None) == wants_input
    assert own.shape == (len(x), 6 * sum(trained))
    parameters = [p for p, train in zip(layer.parameters(), trained, strict=True) if train]
    for index in range(len(x)):
        if index == 1:
            assert not (trained[0] and own[index].isfinite().all())
            continue
        one = x[index : index + 1].requires_grad_()
        inputs = torch.autograd.grad(layer(one), [one, *parameters], g[index : index + 1])
        torch.testing.assert_close(own[index], torch.cat(inputs[1:]), rtol=1e-9, atol=1e-9)
        if dx is not None:
            torch.testing.assert_close(dx[index], inputs[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 6), nn.LayerNorm(8)])
def test_rounding_far_from_zero_does_not_follow_the_size_of_the_batch(
    layer, compiling, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    x, g = 1e4 + torch.randn(4, 6, 8), torch.randn(4, 6, 8)
    rule = (GroupNormRule if isinstance(layer, nn.GroupNorm) else LayerNormRule).from_module(layer)
    found = [
        rule.gradients(g / n, x, layer.weight.detach(), wanted=(True, True, True)) for n in (1, 3)
    ]
    for one, third in zip(*found, strict=True):
        torch.testing.assert_close(third * 3, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
def test_the_layers_below_get_the_same_gradient(bound, normalize):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    x, target = torch.randn(5, 2, 6).double() * 10, torch.randn(5, 2).double()
    clipping = layerwise(bound=bound, normalize=normalize)
    node, around = _both_ways(model, (2, 6), clipping, x, target)
    torch.testing.assert_close(node[1], around[1], rtol=1e-9, atol=1e-12)
