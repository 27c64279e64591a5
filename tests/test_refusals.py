"""A refused ``make_private`` says why, leaves nothing behind, and can be repeated."""

from __future__ import annotations

import warnings
from typing import Any

import opacus
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import (
    BackpropClipHooks,
    BackpropClipModule,
    CoverageError,
    PrivacyEngine,
    clip_inputs,
)
from tests.budgets import layerwise
from tests.helpers import Private, dataset, make_private, mlp, snapshot, train_step
from tests.refusals import NOT_A_NORM, REFUSALS, SGD, Endless


def call(engine: opacus.PrivacyEngine, model: nn.Module, **options: Any) -> Private:
    options = {
        "optimizer": SGD(model.parameters(), lr=0.1),
        "data_loader": DataLoader(dataset(), batch_size=8),
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "clipping": "backprop",
    } | options
    with warnings.catch_warnings():
        # Opacus remembers the data set of a call that failed, and says so in the next.
        warnings.filterwarnings("ignore", message="PrivacyEngine detected new dataset object")
        handle, optimizer, loader = engine.make_private(module=model, **options)
    return Private(engine, handle, optimizer, loader, handle)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_call_says_why_leaves_nothing_behind_and_can_be_repeated(name: str) -> None:
    refusal = REFUSALS[name]
    model, engine = refusal.model(), PrivacyEngine()
    # With everything frozen there is no optimizer to make but one of nothing.
    optimizer = refusal.options.get("optimizer") or SGD(model.parameters(), lr=0.1)
    before, attributes = snapshot(model, optimizer), set(vars(engine))
    with pytest.raises(refusal.error) as raised:
        call(engine, model, **{"optimizer": optimizer, **refusal.options})
    assert refusal.message in str(raised.value)
    if raised.type in (ValueError, CoverageError):
        assert str(raised.value) == refusal.message
    assert snapshot(model, optimizer) == before
    assert set(vars(engine)) == attributes
    private = call(engine, refusal.repair(model))
    train_step(private)
    assert private.steps == 1


def test_a_model_with_our_hooks_but_no_wrapper_is_refused_and_goes_on_training() -> None:
    model = mlp()
    private = make_private(model, wrap_model=False)
    before = snapshot(model)
    with pytest.raises(CoverageError) as refusal:
        make_private(model)
    assert str(refusal.value) == (
        "The model has backpropagation clipping attached already. Call cleanup() on the model "
        "that make_private returned, or pass a fresh one. For several optimizers of one model, "
        "pass opacus_bpclip.SeveralOptimizers(one, other) in one call."
    )
    assert snapshot(model) == before
    train_step(private)
    private.handle.cleanup()
    train_step(make_private(model))


def test_a_model_with_opacus_hooks_but_no_wrapper_is_refused() -> None:
    model = mlp()
    handle = make_private(model, clipping="flat", wrap_model=False).handle
    with pytest.raises(ValueError, match=r"^The model is wrapped already \(Sequential\)\."):
        make_private(model)
    handle.cleanup()
    train_step(make_private(model))


@pytest.mark.parametrize("wrap_model", [True, False], ids=["wrapped", "hooks only"])
def test_a_refused_call_keeps_the_models_own_input_clipping(wrap_model: bool) -> None:
    model = clip_inputs(mlp(), 0.5)
    x = dataset().tensors[0]
    before, clipped = snapshot(model), model(x)
    with pytest.raises(ValueError, match="not supported for IterableDataset"):
        call(
            PrivacyEngine(),
            model,
            data_loader=DataLoader(Endless(), batch_size=8),
            wrap_model=wrap_model,
        )
    assert torch.equal(model(x), clipped)
    assert snapshot(model) == before


def test_a_product_bound_without_input_clipping_is_refused_before_make_private() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'^bound="product" needs max_input_norm'):
        make_private(model, backprop=layerwise(bound="product", max_input_norm=None))
    assert snapshot(model) == before


@pytest.mark.parametrize("hooks", [BackpropClipHooks, BackpropClipModule])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"max_grad_norm": -1.0}, NOT_A_NORM.format(value=-1.0), id="max_grad_norm"),
        pytest.param(
            {"loss_reduction": "none"},
            'Expected loss_reduction=\'none\' to be "mean" or "sum".',
            id="loss_reduction",
        ),
        pytest.param(
            {"config": layerwise(allocation={"0": 1.0})},
            "allocation does not match the model's trainable layers; no share for: 2. "
            "Give a share to each of: 0, 2.",
            id="allocation",
        ),
    ],
)
def test_hooks_made_without_an_engine_refuse_as_cleanly(
    hooks: type[BackpropClipHooks], options: dict[str, Any], message: str
) -> None:
    model = clip_inputs(mlp(), 0.5)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Expected|allocation") as refusal:
        hooks(model, **options)
    assert str(refusal.value) == message
    assert snapshot(model) == before
    train_step(make_private(model))
