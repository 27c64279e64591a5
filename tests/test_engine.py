"""``make_private`` returns what trains privately, and leaves other clippings to Opacus."""

from __future__ import annotations

import pytest
import torch
from opacus.data_loader import DPDataLoader
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipHooks,
    BackpropClipModule,
    BackpropClipOptimizer,
    PrivacyEngine,
)
from tests.budgets import layerwise
from tests.helpers import (
    FEATURES,
    dataset,
    loss_of,
    make_private,
    mlp,
    snapshot,
    summed,
    train_step,
    values,
)

SGD = torch.optim.SGD


def test_wrapping_returns_a_module_around_the_model() -> None:
    model = mlp()
    private = make_private(model)
    assert type(private.handle) is BackpropClipModule
    assert private.handle._module is model
    assert type(private.optimizer) is BackpropClipOptimizer
    assert isinstance(private.loader, DPDataLoader)
    train_step(private)


def test_not_wrapping_returns_hooks_and_leaves_the_model_its_type() -> None:
    model = mlp()
    keys = list(model.state_dict())
    private = make_private(model, wrap_model=False)
    assert type(private.handle) is BackpropClipHooks
    assert not isinstance(private.handle, nn.Module)
    assert type(model) is nn.Sequential
    # Inputs are clipped: the state says to what norm.
    assert [key for key in model.state_dict() if "max_input_norm" not in key] == keys
    train_step(private)


def test_both_modes_train_alike() -> None:
    wrapped, hooked = make_private(mlp()), make_private(mlp(), wrap_model=False)
    for _ in range(2):
        train_step(wrapped)
        train_step(hooked)
    assert torch.equal(values(wrapped), values(hooked))


@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks only"])
def test_cleanup_restores_the_model_but_for_its_input_clipping(wrap_model: bool) -> None:
    model = mlp()
    before = snapshot(model)
    private = make_private(
        model, wrap_model=wrap_model, backprop=layerwise(max_input_norm=None), lr=0.0
    )
    train_step(private)
    private.optimizer.zero_grad(set_to_none=True)
    private.handle.cleanup()
    private.handle.cleanup()
    assert snapshot(model) == before
    train_step(make_private(model))


def test_the_default_options_are_used_when_none_are_given() -> None:
    assert make_private(mlp()).handle._config == layerwise()


def test_poisson_sampling_can_be_turned_off() -> None:
    loader = DataLoader(dataset(), batch_size=8)
    model = mlp()
    engine = PrivacyEngine()
    _, _, same = engine.make_private(
        module=model,
        optimizer=SGD(model.parameters(), lr=0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        clipping="backprop",
    )
    assert same is loader


def test_an_optimizer_that_is_private_already_is_unwrapped() -> None:
    model = mlp()
    inner = SGD(model.parameters(), lr=0.1)
    wrapped = DPOptimizer(inner, noise_multiplier=1, max_grad_norm=1, expected_batch_size=1)
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=wrapped,
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    assert optimizer.original_optimizer is inner


def test_the_noise_generator_makes_training_repeatable() -> None:
    results = []
    for seed in (7, 7, 8):
        generator = torch.Generator().manual_seed(seed)
        private = make_private(mlp(), noise_multiplier=1.0, noise_generator=generator)
        train_step(private)
        results.append(values(private))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_empty_poisson_batches_from_the_real_loader_are_steps_like_any_other() -> None:
    torch.manual_seed(0)
    private = make_private(mlp(), data=dataset(5), batch_size=1, noise_multiplier=1.0)
    sizes = []
    for _ in range(4):
        for x, y in private.loader:
            sizes.append(len(x))
            private.optimizer.zero_grad()
            loss_of(private.model, x, y).backward()
            private.optimizer.step()
    assert sizes.count(0) >= 3
    assert private.steps == len(sizes) == 20
    assert values(private).isfinite().all()


def test_an_empty_first_poisson_batch_of_images_is_a_step() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    images = TensorDataset(torch.randn(50, 1, 4, 4), torch.zeros(50, dtype=torch.long))
    private = make_private(model, data=images, batch_size=1, noise_multiplier=1.0)
    x, y = private.loader.collate_fn([])
    assert x.shape == (0, 1, 4, 4)
    loss_of(private.model, x, y).backward()
    private.optimizer.step()
    assert private.steps == 1
    assert not summed(private).any()


def test_noise_multiplier_may_be_zero_as_in_opacus() -> None:
    assert make_private(mlp(), noise_multiplier=0).optimizer.noise_multiplier == 0


def test_an_allocation_by_name_sets_each_layers_sensitivity() -> None:
    private = make_private(
        mlp(), max_grad_norm=2.0, backprop=layerwise(allocation={"2": 3.0, "0": 1.0})
    )
    assert private.optimizer.layer_sensitivities == pytest.approx({"0": 1.0, "2": 3.0**0.5})


class Configured(nn.Module):
    """A model whose attributes have names that a wrapper might use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 3)
        self.config = {"use_cache": True}
        self.guard, self.prober, self.undo, self.max_grad_norm = "guard", "prober", "undo", 5
        self.layer_sensitivities = {"layer": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def generate(self) -> str:
        return "generated"


def test_the_wrapper_shows_the_models_own_attributes() -> None:
    model = Configured()
    handle = make_private(model).handle
    assert handle.config is model.config
    handle.config["use_cache"] = False
    assert (handle.guard, handle.prober, handle.undo) == ("guard", "prober", "undo")
    assert (handle.max_grad_norm, handle.layer_sensitivities) == (5, {"layer": 1})
    assert handle.generate() == "generated"
    assert handle.layer is model.layer
    with pytest.raises(AttributeError, match="'Configured' object has no attribute 'nothing'"):
        _ = handle.nothing


@pytest.mark.parametrize("kind", [BackpropClipHooks, BackpropClipModule])
def test_the_wrapper_adds_no_public_name_to_opacus_own(kind: type) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 3))
    ours = kind(model)
    opacus_own = {*dir(AbstractGradSampleModule), "batch_first", "loss_reduction"}
    opacus_own |= {"grad_accumulation_hook", *vars(nn.Module())}
    assert {name for name in (*dir(ours), *vars(ours)) if not name.startswith("_")} <= opacus_own


@pytest.mark.parametrize("items", [49, 98, 103])
def test_the_expected_batch_size_is_never_rounded_down_to_nothing(items: int) -> None:
    private = make_private(mlp(), data=dataset(items), batch_size=1)
    assert private.optimizer.expected_batch_size == 1
    train_step(private)
    assert values(private).isfinite().all()
