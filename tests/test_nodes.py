"""A node in the layer's place computes what clipping around the layer computes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import BackpropClipping, layer_clips
from tests.checks import Trainer, joint
from tests.strategies import MODES, norm_cases, product_cases, seeds


def _both_ways(layer, shape, clipping, x, target):
    """Return output and sum by the node, and by autograd between two clips."""
    found = []
    for nodes in (layer_clips.NODES, {}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layer_clips, "NODES", nodes)
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
    bound, upstream = mode
    clipping = BackpropClipping(bound=bound, upstream=upstream, max_input_norm=max_input_norm)
    node, around = _both_ways(layer, case.shape, clipping, x, target)
    for one, other in zip(node, around, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@given(norm_cases(), seeds, st.sampled_from(["clip", "normalize"]))
def test_a_normalisations_node_does_what_its_clips_do_with_the_exact_bound(case, seed, upstream):
    torch.manual_seed(seed)
    layer = case.layer.double()
    x = torch.randn(4, *case.shape, dtype=torch.float64)
    target = torch.randn(4, layer(x).flatten(1).shape[1], dtype=torch.float64)
    clipping = BackpropClipping(bound="exact", upstream=upstream)
    node, around = _both_ways(layer, case.shape, clipping, x, target)
    for one, other in zip(node, around, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("upstream", ["clip", "normalize"])
@pytest.mark.parametrize("bound", ["product", "weighted", "exact"])
def test_the_layers_below_get_the_same_gradient(bound, upstream):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2)
    ).double()
    x, target = torch.randn(5, 2, 6).double() * 10, torch.randn(5, 2).double()
    clipping = BackpropClipping(bound=bound, upstream=upstream)
    node, around = _both_ways(model, (2, 6), clipping, x, target)
    torch.testing.assert_close(node[1], around[1], rtol=1e-9, atol=1e-12)
