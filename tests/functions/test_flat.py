"""Functions on parameters: the clipped sum is autograd's, one example at a time, clipped flat."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer
from tests.functions.parts import PARTS, D, Stack, T, Twice
from tests.joint.flat import batch_of
from tests.joint.helpers import check_flat, clipped_flat, own_gradients, released
from tests.strategies import seeds

NAMES = sorted(PARTS)


def _check(model: nn.Module, **options: object) -> None:
    x, target = batch_of(model.double(), (T, D), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target, **options)


@pytest.mark.parametrize("name", NAMES)
def test_each_part_is_clipped_flat(name):
    torch.manual_seed(0)
    _check(Stack([name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_is_used_twice_is_measured_once(name):
    torch.manual_seed(1)
    _check(Twice(name))


@settings(max_examples=25)
@given(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), seeds)
def test_parts_after_one_another_are_clipped_flat(names, seed):
    torch.default_generator.manual_seed(seed)
    _check(Stack(names), limits=(1.0,))


@pytest.mark.parametrize("name", NAMES)
def test_in_float32_it_is_the_same_to_rounding(name):
    torch.manual_seed(2)
    model = Stack([name])
    x, target = batch_of(model, (T, D), torch.float32)
    expected = clipped_flat(own_gradients(copy.deepcopy(model), x, target), 1.0)
    trainer = Trainer(model, (T, D), BackpropClipping(), dtype=torch.float32)
    assert (released(trainer, x, target) - expected).norm() <= 1e-4 * len(x)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NAMES)
def test_with_a_limit_for_each_layer_that_none_reaches_it_is_autograds_gradient(name, reduction):
    torch.manual_seed(3)
    model = Twice(name).double()
    x, target = batch_of(model, (T, D), torch.float64)
    expected = sum(own_gradients(copy.deepcopy(model), x, target))
    clipping = BackpropClipping(allocation="equal")
    trainer = Trainer(model, (T, D), clipping, max_grad_norm=1e6, reduction=reduction)
    assert (released(trainer, x, target) - expected).norm() <= 1e-9 * expected.norm()
