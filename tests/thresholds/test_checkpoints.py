"""What thresholds outlive: checkpoints, and copies of the optimizer."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.budgets import layerwise
from tests.helpers import Private, batch, hand_over, make_private, mlp
from tests.thresholds.helpers import adaptive, adaptive_model, loss_of, train_step


def test_a_checkpoint_goes_on_with_its_thresholds() -> None:
    private, resumed = adaptive_model(), adaptive_model()
    for _ in range(3):
        train_step(private)
    state = copy.deepcopy(private.optimizer.state_dict())
    resumed.optimizer.load_state_dict(state)
    resumed.model.load_state_dict(private.model.state_dict())
    assert resumed.optimizer.thresholds == private.optimizer.thresholds
    for each in (private, resumed):
        train_step(each)
    assert resumed.optimizer.thresholds == private.optimizer.thresholds


def test_a_checkpoint_of_fixed_thresholds_leaves_them_to_the_new_options() -> None:
    fixed, moving = make_private(mlp(), backprop=BackpropClipping()), adaptive_model()
    with pytest.warns(UserWarning, match="checkpoint") as told:
        moving.optimizer.load_state_dict(fixed.optimizer.state_dict())
    texts = " ".join(str(warning.message) for warning in told)
    assert "threshold was 'None' and is 'AdaptiveThreshold" in texts
    assert "no thresholds, so that they go on from where they are: {'(model)': 0.5}" in texts
    assert moving.optimizer.thresholds == {"(model)": 0.5}


def test_thresholds_of_other_layers_are_refused() -> None:
    layers = layerwise(allocation="equal", threshold=adaptive())
    private = adaptive_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError, match=r"thresholds of 0, 2; the model has them of \(model\)"
        ):
            private.optimizer.load_state_dict(
                adaptive_model(backprop=layers).optimizer.state_dict()
            )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0, 0.0, 0.01, 1e9, "0.5"])
def test_a_threshold_out_of_range_is_not_loaded(wrong: Any) -> None:
    private = adaptive_model()
    state = copy.deepcopy(private.optimizer.state_dict())
    state["thresholds"]["thresholds"]["(model)"] = wrong
    with pytest.raises(ValueError, match=r"for \(model\); expected a number from 0\.02 to"):
        private.optimizer.load_state_dict(state)
    assert private.optimizer.thresholds == {"(model)": 0.5}


def test_a_checkpoint_is_not_loaded_under_gradients_that_wait() -> None:
    private = adaptive_model()
    state = copy.deepcopy(private.optimizer.state_dict())
    hand_over(private, 6)
    loss_of(private.model, *batch()).backward()
    with pytest.raises(PrivacyViolationError, match=r"Load it between step\(\) and backward\(\)"):
        private.optimizer.load_state_dict(state)
    private.optimizer.step()
    private.optimizer.load_state_dict(state)


def test_a_checkpoint_that_torch_refuses_leaves_the_thresholds() -> None:
    private = adaptive_model()
    state = copy.deepcopy(private.optimizer.state_dict())
    state["thresholds"]["thresholds"]["(model)"] = 2.0
    state["param_groups"] = []
    with pytest.raises(ValueError, match="parameter groups"):
        private.optimizer.load_state_dict(state)
    assert private.optimizer.thresholds == {"(model)": 0.5}


def test_a_copy_has_thresholds_of_its_own() -> None:
    private = adaptive_model()
    train_step(private)
    before = dict(private.optimizer.thresholds)
    model, optimizer = copy.deepcopy((private.model, private.optimizer))
    twin = Private(private.engine, model, optimizer, private.loader, model)
    train_step(twin)
    assert twin.optimizer.thresholds != before
    assert private.optimizer.thresholds == before
