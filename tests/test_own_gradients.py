"""The exact bound by per-example gradients, which are computed, measured and summed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip.rules import ConvRule, FusedRule, LinearRule, bound_of, conv, exact_norms
from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_independence, joint
from tests.strategies import product_cases, seeds


def _rule(layer):
    return (LinearRule if isinstance(layer, nn.Linear) else ConvRule).from_module(layer)


@pytest.mark.parametrize("groups_are_fast", [True, False])
@given(case=product_cases, seed=seeds, scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_each_is_what_autograd_makes_of_the_example_alone(case, seed, scale, groups_are_fast):
    layer = case.layer.double()
    rule = _rule(layer)
    assume(rule.is_closed())
    torch.manual_seed(seed)
    x = torch.randn(4, *case.shape, dtype=torch.float64)
    g = torch.randn_like(layer(x)) * scale
    x[1].fill_(torch.nan)  # must not affect other examples
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConvRule, "_groups_are_fast", lambda self, g: groups_are_fast)
        own = rule.own_gradients(g, x, layer.weight.detach())
    assert own.shape == (4, *layer.weight.shape)
    for index in (0, 2, 3):
        one = slice(index, index + 1)
        (expected,) = torch.autograd.grad(layer(x[one]), layer.weight, g[one])
        torch.testing.assert_close(own[index], expected, rtol=1e-9, atol=1e-9 * scale)


@given(
    product_cases,
    seeds,
    st.sampled_from([False, True]),
    st.sampled_from([None, 0.1, 100.0]),
    st.sampled_from([None, "x", "target"]),
    st.sampled_from([1, 8]),
)
def test_they_add_up_to_what_pairs_of_positions_give(
    case, seed, normalize, max_norm, broken, block
):
    torch.manual_seed(seed)
    layer = case.layer.double()
    x = torch.randn(5, *case.shape, dtype=torch.float64)
    target = torch.randn(5, layer(x).flatten(1).shape[1], dtype=torch.float64)
    if broken is not None:
        {"x": x, "target": target}[broken][2] = torch.inf
    clipping = layerwise(bound="exact", normalize=normalize, max_input_norm=max_norm)
    found = []
    for own in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusedRule, "sums_own", lambda self, _, g, own=own: own and self.weight)
            patch.setattr(conv, "_BLOCK", block)
            patch.setattr(exact_norms, "EXACT_MEMORY_CAP", 2 * layer.weight.numel() * x.itemsize)
            trainer = Trainer(copy.deepcopy(layer), case.shape, clipping, max_grad_norm=0.7)
            found.append(joint(trainer.released(x, target)))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_of_many_channels_tells_examples_apart(groups):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 4, 3, padding=1, groups=groups)
    assert _rule(layer)._groups_are_fast(torch.zeros(1))
    trainer = Trainer(layer, (16, 6, 6), layerwise(bound="exact"))
    x, target = torch.randn(3, 16, 6, 6).double(), torch.randn(3, 144).double()
    x[1] *= HUGE
    target[2] *= HUGE
    check_independence(trainer, x, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_lower_precision_they_are_added_up_in_float32(dtype):
    rule = _rule(nn.Linear(4, 3))
    g, x = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 9, 4).to(dtype)
    own = rule.own_gradients(g, x, torch.zeros(3, 4, dtype=dtype))
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, g.float().transpose(1, 2) @ x.float())


@pytest.mark.parametrize(
    ("kind", "shape", "weight", "own"),
    [
        ("exact", (5, 9, 3), True, True),
        ("weighted", (5, 9, 3), True, False),
        ("exact", (5, 9, 3), False, False),  # the bias's gradient is a sum, and known
        ("exact", (5, 3), True, False),  # one position: the norm is a product
        ("exact", (0, 9, 3), True, False),
    ],
)
def test_they_are_made_where_they_are_worth_it(kind, shape, weight, own):
    rule = LinearRule(weight=weight, bias=True, in_features=2)
    assert rule.sums_own(bound_of(kind), torch.zeros(shape)) is own
