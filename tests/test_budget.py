"""``make_private_with_epsilon`` finds Opacus's own noise for a budget."""

from __future__ import annotations

from typing import Any

import opacus
import pytest
import torch
from opacus.accountants.utils import get_noise_multiplier
from opacus.data_loader import DPDataLoader
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine
from tests.budgets import layerwise
from tests.helpers import (
    SEARCHES_FOR_NOISE,
    Private,
    dataset,
    mlp,
    snapshot,
    train_step,
)

SGD = torch.optim.SGD


def with_epsilon(
    engine: opacus.PrivacyEngine, model: nn.Module, **options: Any
) -> tuple[Any, DPOptimizer, DataLoader]:
    options = {
        "target_epsilon": 2.0,
        "target_delta": 1e-5,
        "epochs": 2,
        "max_grad_norm": 1.0,
        "clipping": "backprop",
    } | options
    return engine.make_private_with_epsilon(
        module=model,
        optimizer=SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(dataset(), batch_size=8),
        **options,
    )


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize(
    ("accountant", "tolerance"),
    [
        pytest.param("rdp", {}, id="rdp"),
        pytest.param("rdp", {"epsilon_tolerance": 0.5}, id="rdp, tolerance"),
        pytest.param("prv", {"epsilon_tolerance": 0.5}, id="prv, tolerance"),
    ],
)
def test_the_noise_for_a_budget_is_opacus_own(accountant: str, tolerance: dict[str, float]) -> None:
    handle, optimizer, _ = with_epsilon(
        PrivacyEngine(accountant=accountant),
        mlp(),
        backprop=layerwise(bound="exact"),
        **tolerance,
    )
    assert handle._config.bound == "exact"
    assert optimizer.noise_multiplier == get_noise_multiplier(
        target_epsilon=2.0,
        target_delta=1e-5,
        sample_rate=0.25,
        epochs=2,
        accountant=accountant,
        **tolerance,
    )


@SEARCHES_FOR_NOISE
def test_the_budget_is_kept_over_the_planned_epochs() -> None:
    engine, model = PrivacyEngine(accountant="gdp"), mlp()
    handle, optimizer, loader = with_epsilon(engine, model)
    private = Private(engine, handle, optimizer, loader, handle)
    for _ in range(2 * len(loader)):
        train_step(private)
    assert 1.98 <= engine.get_epsilon(1e-5) <= 2.0


@SEARCHES_FOR_NOISE
def test_options_for_a_budget_that_change_nothing_are_accepted() -> None:
    _, optimizer, loader = with_epsilon(
        PrivacyEngine(accountant="gdp"),
        mlp(),
        rand_on_empty=False,
        loss_reduction="sum",
        poisson_sampling=False,
    )
    assert optimizer.loss_reduction == "sum"
    assert not isinstance(loader, DPDataLoader)


@SEARCHES_FOR_NOISE
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param(
            {"typo": 1},
            ValueError,
            r"^Unknown options for make_private_with_epsilon: typo\.$",
            id="unknown",
        ),
        pytest.param(
            {"rand_on_empty": True},
            ValueError,
            "^rand_on_empty=True adds a made-up example to empty batches",
            id="rand_on_empty",
        ),
        pytest.param(
            {"max_grad_norm": 0.0},
            ValueError,
            r"^Expected max_grad_norm=0\.0 to be a finite number > 0\.$",
            id="max_grad_norm",
        ),
        pytest.param(
            {"clipping": "flat", "backprop": layerwise()},
            ValueError,
            "was given with clipping='flat'",
            id="options for another clipping",
        ),
        pytest.param(
            {"steps": 8},
            ValueError,
            "takes as input EITHER a number of steps or a number of epochs",
            id="steps and epochs",
        ),
        pytest.param(
            {"noise_multiplier": 1.0}, (TypeError, ValueError), "noise_multiplier", id="noise"
        ),
        pytest.param({"kwargs": 1}, (TypeError, ValueError), "kwargs", id="called kwargs"),
    ],
)
def test_a_refused_budget_leaves_nothing_behind(
    options: dict[str, Any], error: Any, message: str
) -> None:
    model, engine = mlp(), PrivacyEngine(accountant="gdp")
    before, attributes = snapshot(model), set(vars(engine))
    with pytest.raises(error, match=message):
        with_epsilon(engine, model, **options)
    assert snapshot(model) == before
    assert set(vars(engine)) == attributes
    handle, optimizer, loader = with_epsilon(engine, model)
    train_step(Private(engine, handle, optimizer, loader, handle))
