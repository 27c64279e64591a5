"""Losses that go through a model more than once: the errors, and the remedies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity
from tests.helpers import (
    CLASSES,
    FEATURES,
    Private,
    assert_refused_until_zero_grad,
    batch,
    hand_over,
    make_private,
    mlp,
    train_step,
    values,
)

TWO_FORWARDS = (
    "One backward pass came from two forward passes of the model (a siamese or triplet loss, "
    "R-Drop, a discriminator on real and generated examples): an example that is in both would "
    "contribute twice, and it is unknown which rows belong together. Put them in one call: give "
    "the model a forward that takes all inputs, runs its layers on each, and returns all outputs, "
    "and declare how often it uses each layer: BackpropClipping(uses={name: K})."
)
PENALTY = (
    "A gradient was taken with create_graph=True through a layer that clips (a gradient penalty, "
    "as in WGAN-GP or R1, or a second-order optimizer). A loss computed from that gradient has "
    "gradients that no rule bounds, so they would not be private. Leave the penalty out of the "
    "loss; the optimizer's weight_decay keeps a model's slope small, too."
)


def siamese(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - model(x.flip(1))).square().mean()


def triplet(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.triplet_margin_loss(model(x), model(x + 1), model(x - 1))


def real_and_generated(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.softplus(-model(x)).mean() + F.softplus(model(torch.randn_like(x))).mean()


@pytest.mark.parametrize("loss", [siamese, triplet, real_and_generated])
@pytest.mark.parametrize(
    ("poisson_sampling", "counted"), [(True, True), (True, False), (False, False)]
)
def test_two_forward_passes_in_one_loss_are_named(
    loss: Callable[..., Tensor], counted: bool, poisson_sampling: bool
) -> None:
    private = make_private(mlp(), counted=counted, poisson_sampling=poisson_sampling)
    x, y = batch()
    hand_over(private, 2 * len(x))
    with pytest.raises(PrivacyViolationError) as refusal:
        loss(private.model, x, y).backward()
    assert str(refusal.value) == TWO_FORWARDS
    assert_refused_until_zero_grad(private)


class Siamese(nn.Module):
    """The remedy: one forward that takes all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x[:, :FEATURES]) - self.body(x[:, FEATURES:])


@pytest.mark.parametrize("uses", [{"body.0": 2, "body.2": 2}, "auto"])
def test_one_forward_that_takes_all_inputs_trains_within_its_sensitivity(uses: Any) -> None:
    trainer = Trainer(Siamese(), (2 * FEATURES,), layerwise(uses=uses))
    x, target = torch.randn(5, 2 * FEATURES).double() * 30, torch.randn(5, CLASSES).double() * 30
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


def penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    return slope.square().sum() + y


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(FEATURES, 3)),
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(FEATURES), nn.Tanh()),
    "clipped around": lambda: nn.Sequential(nn.PReLU()),
    "frozen norm": lambda: nn.Sequential(
        nn.Linear(FEATURES, 3), nn.LayerNorm(3).requires_grad_(False), nn.Tanh()
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_gradient_penalty_is_named(name: str) -> None:
    private = make_private(LAYERS[name]())
    with pytest.raises(PrivacyViolationError) as refusal:
        penalty(private.model, batch()[0]).backward()
    assert str(refusal.value) == PENALTY
    private.optimizer.zero_grad()


def test_a_gradient_that_is_only_looked_at_is_no_penalty() -> None:
    private = make_private(mlp())
    x = batch()[0].requires_grad_()
    (slope,) = torch.autograd.grad(private.model(x).sum(), x)
    assert slope.shape == x.shape
    private.optimizer.zero_grad()
    train_step(private)


def test_weight_decay_or_an_update_after_the_step_stand_in_for_a_weight_penalty() -> None:
    decayed, shrunk = make_private(mlp()), make_private(mlp())
    decayed.optimizer.param_groups[0]["weight_decay"] = 0.1
    for _ in range(3):
        before = values(shrunk)
        train_step(shrunk)
        with torch.no_grad():
            start = 0
            for p in shrunk.parameters:
                p -= 0.1 * 0.1 * before[start : start + p.numel()].view_as(p)
                start += p.numel()
        train_step(decayed)
    torch.testing.assert_close(values(decayed), values(shrunk))


SCALED = (
    "GradScaler multiplies the loss by a number that depends on the data (it shrinks where "
    "gradients overflow), so the clipped gradients would have another scale than the noise. Train "
    "in bfloat16 or float32 without GradScaler; GradScaler(enabled=False) does nothing and may "
    "stay."
)


def scaled_step(private: Private, scaler: torch.amp.GradScaler, *, unscale: bool = False) -> None:
    x, y = batch()
    private.optimizer.zero_grad()
    scaler.scale(F.cross_entropy(private.model(x), y)).backward()
    if unscale:
        scaler.unscale_(private.optimizer)
    scaler.step(private.optimizer)
    scaler.update()


@pytest.mark.parametrize("unscale", [True, False])
def test_a_grad_scaler_is_refused_before_anything_moves(unscale: bool) -> None:
    private = make_private(mlp())
    before = values(private)
    with pytest.raises(ValueError, match="GradScaler") as refusal:
        scaled_step(private, torch.amp.GradScaler("cpu"), unscale=unscale)
    assert str(refusal.value) == SCALED
    assert torch.equal(values(private), before)
    assert private.steps == 0


def test_a_grad_scaler_that_is_switched_off_may_stay() -> None:
    private = make_private(mlp())
    scaled_step(private, torch.amp.GradScaler("cpu", enabled=False))
    assert private.steps == 1
