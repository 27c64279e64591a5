"""Several models: each on samples of its own, one module for those that train together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
)

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from tests.helpers import FEATURES, dataset, mlp, values
from tests.sampling import NOTHING_DRAWN, counted, first, train


class Coder(nn.Module):
    """An autoencoder in two parts."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([encoder, decoder])

    def forward(self, x: Tensor) -> Tensor:
        encoder, decoder = self.parts
        return decoder(encoder(x))


def test_two_models_may_each_train_on_samples_of_their_own() -> None:
    engine = PrivacyEngine()
    data = dataset()
    both = [counted(engine=engine, data=data) for _ in range(2)]
    for private in both:
        for x, y in private.loader:
            train(private, x, y)
    assert engine.accountant.history == [(1.0, 1 / 4, 8)]


def test_two_models_on_one_sample_are_refused_and_one_module_for_both_is_accounted_right() -> None:
    engine = PrivacyEngine()
    encoder, decoder = nn.Linear(FEATURES, 2), nn.Linear(2, FEATURES)
    data = dataset()
    one = counted(encoder, engine=engine, data=data)
    other = counted(decoder, engine=engine, data=data)
    x, _ = first(other)
    F.mse_loss(other.model(one.model(x)), x).backward()
    other.optimizer.step()
    with pytest.raises(PrivacyViolationError) as refusal:
        one.optimizer.step()
    assert str(refusal.value) == NOTHING_DRAWN.format(rows=len(x))
    for private in (one, other):
        private.handle.cleanup()

    engine = PrivacyEngine()
    model = Coder(encoder, decoder)
    groups = [
        {"params": part.parameters(), "lr": lr}
        for part, lr in zip(model.parts, (0.1, 0.2), strict=True)
    ]
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(groups),
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    for x, _ in loader:
        optimizer.zero_grad()
        F.mse_loss(handle(x), x).backward()
        optimizer.step()
    assert engine.accountant.history == [(1.0, 1 / 4, 4)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_private_loader_that_is_passed_again_gives_samples_of_their_own() -> None:
    one = counted()
    other, optimizer, loader = one.engine.make_private(
        module=(model := mlp()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=one.loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    assert loader is not one.loader
    assert len(loader) == len(one.loader)
    x, y = first(one)
    F.cross_entropy(other(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="has drawn no batch"):
        optimizer.step()
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(other(x), y).backward()
        optimizer.step()


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, FEATURES)

    def forward(self, z: Tensor) -> Tensor:
        return self.layer(z)


@pytest.mark.parametrize("how", ["as it is", "frozen meanwhile", "by a gradient of its input"])
def test_a_generator_trains_through_a_private_discriminator(how: str) -> None:
    private, generator = counted(), Generator()
    other = torch.optim.SGD(generator.parameters(), lr=0.1)
    parameters = list(private.handle._module.parameters())
    for x, y in private.loader:
        train(private, x, y)
        private.optimizer.zero_grad()
        before = values(private)
        other.zero_grad()
        fake = generator(torch.randn(9, 2))
        if how == "by a gradient of its input":
            (slope,) = torch.autograd.grad(private.model(fake).sum(), fake)
            fake.backward(slope)
        else:
            for p in parameters:
                p.requires_grad_(how == "as it is")
            private.model(fake).sum().backward()
            for p in parameters:
                p.requires_grad_(True)
        other.step()
        assert generator.layer.weight.grad is not None
        assert torch.equal(values(private), before)
        private.optimizer.zero_grad()
    assert private.steps == len(private.loader)


def test_what_a_generator_left_in_the_discriminator_is_not_released() -> None:
    private = counted()
    private.model(torch.randn(9, FEATURES)).sum().backward()
    with pytest.raises(PrivacyViolationError) as refusal:
        private.optimizer.step()
    assert str(refusal.value) == NOTHING_DRAWN.format(rows=9)


def test_a_copy_does_not_inherit_the_batches_that_wait() -> None:
    private = counted()
    x, y = first(private)
    model, optimizer = copy.deepcopy((private.model, private.optimizer))
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyViolationError, match="has drawn no batch"):
        optimizer.step()
    train(private, x, y)
