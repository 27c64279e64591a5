"""Normalisation layers without trainable parameters: the gradient that flows through them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from opacus_bpclip.hooks import BackpropClipHooks
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence


def _frozen(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad_(False)
    return layer


LAYERS = {
    "layer-norm": lambda: _frozen(nn.LayerNorm(6)),
    "layer-norm-without-weight": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "layer-norm-over-two-axes": lambda: _frozen(nn.LayerNorm((4, 6))),
    "group-norm": lambda: _frozen(nn.GroupNorm(2, 4)),
    "group-norm-without-weight": lambda: nn.GroupNorm(2, 4, affine=False),
    "instance-norm": lambda: _frozen(nn.InstanceNorm1d(4, affine=True)),
    "instance-norm-without-weight": lambda: nn.InstanceNorm1d(4),
}
everywhere = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


class Between(nn.Module):
    """A frozen layer between two linear ones, over a sequence of 4 positions."""

    def __init__(self, layer, mean=0.0, *, by_name=False):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, 6), layer, nn.Linear(6, 2)
        self.by_name = by_name
        with torch.no_grad():
            self.first.bias += mean

    def forward(self, x):
        x = self.first(x)
        x = self.layer(input=x) if self.by_name else self.layer(x)
        return self.last(x)


def _attached(model):
    hooks = BackpropClipHooks(model, config=layerwise(max_input_norm=None))
    return model, hooks


@everywhere
@pytest.mark.parametrize("by_name", [False, True])
def test_the_gradient_is_autograds(make, by_name):
    torch.manual_seed(0)
    plain = Between(make(), by_name=by_name).double()
    private, _ = _attached(copy.deepcopy(plain))
    x, g = torch.randn(3, 4, 6).double(), torch.randn(3, 4, 6).double()
    found = []
    for model in (plain, private):
        leaf = x.clone().requires_grad_()
        y = model.layer(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, g)
        found.append((y, gradient))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@everywhere
def test_far_from_zero_an_example_is_what_it_is_alone(make):
    torch.manual_seed(0)
    model = Between(make(), mean=1e9)
    trainer = Trainer(model, (4, 6), layerwise(max_input_norm=None))
    check_independence(trainer, torch.randn(3, 4, 6).double(), torch.randn(3, 8).double())


@everywhere
def test_nothing_is_left_behind(make):
    layer = make()
    _, hooks = _attached(Between(layer))
    assert layer._forward_hooks
    hooks.cleanup()
    assert not layer._forward_hooks
    assert not layer._forward_hooks_with_kwargs


@everywhere
def test_without_a_gradient_the_layer_is_left_alone(make):
    model, _ = _attached(Between(make()))
    x = torch.randn(3, 4, 6)
    assert model.layer(x).grad_fn is None
    with torch.no_grad():
        assert not model(x).requires_grad


def test_a_norm_without_a_mean_is_left_to_torch():
    layer = nn.RMSNorm(6, elementwise_affine=False)
    model, _ = _attached(Between(layer))
    assert (
        "_Normalized"
        not in type(model.layer(torch.ones(1, 4, 6).requires_grad_()).grad_fn).__name__
    )
    test_far_from_zero_an_example_is_what_it_is_alone(lambda: copy.deepcopy(layer))


def test_an_activation_may_work_in_place_on_the_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6, elementwise_affine=False), nn.ReLU(True))
    trainer = Trainer(nn.Sequential(model, nn.Linear(6, 2)), (6,), layerwise())
    check_independence(trainer, torch.randn(3, 6).double(), torch.randn(3, 2).double())


def test_an_empty_batch_gives_an_empty_gradient():
    for layer in (nn.GroupNorm(2, 4, affine=False), nn.LayerNorm(6, elementwise_affine=False)):
        model, _ = _attached(Between(layer))
        x = torch.randn(0, 4, 6, requires_grad=True)
        model.layer(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == (0, 4, 6)


@everywhere
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_autograds(make, weight):
    torch.manual_seed(0)
    layer = make().to(weight)
    model, _ = _attached(Between(copy.deepcopy(layer)))
    x, g = torch.randn(2, 3, 4, 6).to(torch.bfloat16)
    found = []
    for one in (layer, model.layer):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(leaf), leaf, g.to(one(leaf).dtype))
        assert gradient.dtype == torch.bfloat16
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)


@everywhere
def test_a_changed_forward_or_output_keeps_its_own_gradient(make):
    for change in ("forward", "hook"):
        layer = make()
        model, _ = _attached(Between(layer))
        if change == "forward":
            layer.forward = lambda x: x * 2
        else:
            layer.register_forward_hook(lambda *args: args[1][0] * 2, prepend=True)
        x = torch.randn(3, 4, 6, requires_grad=True)
        model.layer(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 2))


def test_instance_norms_that_are_more_or_less_than_that_are_left_to_torch():
    for layer, shape in (
        (nn.InstanceNorm1d(4), (4, 6)),
        (nn.InstanceNorm1d(4, track_running_stats=True).eval(), (3, 4, 6)),
    ):
        model, _ = _attached(Between(layer))
        model.train(layer.training)
        y = model.layer(torch.randn(shape, requires_grad=True))
        assert "_Normalized" not in type(y.grad_fn).__name__
