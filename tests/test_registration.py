"""``register`` extends Opacus's own engines; ``unregister`` undoes it completely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import opacus
import pytest
import torch
from torch import nn

from opacus_bpclip import (
    BackpropClipModule,
    BackpropClipOptimizer,
    PrivacyEngine,
    register,
    unregister,
)
from tests.budgets import layerwise
from tests.helpers import SEARCHES_FOR_NOISE, make_private, mlp, snapshot, train_step, values
from tests.test_budget import with_epsilon
from tests.test_other_clippings import OTHERS, train_with


class TheirEngine(opacus.PrivacyEngine):
    """A user's own subclass, with its own ideas about one of the steps."""

    prepared = 0

    def _prepare_model(self, module: nn.Module, **options: Any) -> Any:
        self.prepared += 1
        return super()._prepare_model(module, **options)


def attributes() -> dict[str, Any]:
    return dict(vars(opacus.PrivacyEngine))


@pytest.fixture
def registered() -> Iterator[None]:
    register()
    yield
    unregister()


@pytest.fixture(autouse=True)
def _nothing_is_left_registered() -> Iterator[None]:
    before = attributes()
    yield
    unregister()
    after = attributes()
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("engine", [opacus.PrivacyEngine, TheirEngine, PrivacyEngine])
@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks only"])
def test_any_engine_trains_like_ours(engine: type, wrap_model: bool) -> None:
    options = {"backprop": layerwise(bound="exact"), "wrap_model": wrap_model}
    private = make_private(mlp(), engine=engine(), **options)
    train_step(private)
    unregister()
    ours = make_private(mlp(), **options)
    train_step(ours)
    assert type(private.engine) is engine
    assert type(private.optimizer) is BackpropClipOptimizer
    assert torch.equal(values(private), values(ours))
    assert private.steps == 1


@pytest.mark.usefixtures("registered")
def test_a_subclass_keeps_its_own_steps() -> None:
    engine = TheirEngine()
    make_private(mlp(), engine=engine)
    assert engine.prepared == 1


def test_an_engine_made_before_learns_it_too() -> None:
    engine = opacus.PrivacyEngine()
    register()
    private = make_private(mlp(), engine=engine)
    assert isinstance(private.handle, BackpropClipModule)
    train_step(private)


@SEARCHES_FOR_NOISE
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("engine", [opacus.PrivacyEngine, TheirEngine, PrivacyEngine])
def test_any_engine_meets_a_budget(engine: type) -> None:
    _, optimizer, _ = with_epsilon(
        engine(accountant="gdp"), mlp(), backprop=layerwise(bound="exact")
    )
    unregister()
    _, ours, _ = with_epsilon(PrivacyEngine(accountant="gdp"), mlp())
    assert type(optimizer) is BackpropClipOptimizer
    assert optimizer.noise_multiplier == ours.noise_multiplier


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize("method", ["make_private", "make_private_with_epsilon"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_clippings_stay_stock_opacus_to_the_last_bit(name: str, method: str) -> None:
    options = OTHERS[name].options
    theirs = train_with(opacus.PrivacyEngine, method, **options)
    register()
    ours = train_with(opacus.PrivacyEngine, method, **options)
    assert ours[0] == theirs[0]
    assert torch.equal(ours[1], theirs[1])
    assert ours[2:] == theirs[2:]


@pytest.mark.usefixtures("registered")
def test_a_stock_engine_refuses_as_ours_does() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^Unknown options for make_private: typo\.$"):
        make_private(model, engine=opacus.PrivacyEngine(), typo=1)
    with pytest.raises(ValueError, match="was given with clipping='flat'"):
        make_private(
            model,
            engine=opacus.PrivacyEngine(),
            clipping="flat",
            backprop=layerwise(),
        )
    assert snapshot(model) == before


@pytest.mark.parametrize("times", [1, 2])
def test_registering_is_idempotent_and_is_undone_to_the_last_attribute(times: int) -> None:
    before = attributes()
    for _ in range(times):
        register()
    during = attributes()
    changed = {name for name in before if during[name] is not before[name]}
    assert changed == {
        "make_private",
        "make_private_with_epsilon",
        "_prepare_data_loader",
        "_prepare_model",
        "_prepare_optimizer",
        "save_checkpoint",
        "load_checkpoint",
    }
    assert during.keys() == before.keys()
    for name in changed:
        assert during[name].__wrapped__ is before[name]
        assert during[name].__doc__ == before[name].__doc__
    unregister()
    after = attributes()
    assert all(after[name] is before[name] for name in before)
    unregister()
    assert attributes() == before


def test_without_registration_a_stock_engine_raises_opacus_own_error() -> None:
    register()
    unregister()
    with pytest.raises(ValueError, match=r"^Unexpected optimizer parameters"):
        make_private(mlp(), engine=opacus.PrivacyEngine())


def test_what_was_made_private_goes_on_after_unregister() -> None:
    register()
    private = make_private(mlp(), engine=opacus.PrivacyEngine(), noise_multiplier=1.0)
    unregister()
    train_step(private)
    train_step(private)
    assert private.steps == 2


def test_our_own_engine_needs_no_registration() -> None:
    train_step(make_private(mlp()))
