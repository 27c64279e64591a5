"""A checkpoint tells when it is loaded into other settings than it was saved with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.budgets import layerwise
from tests.helpers import Private, make_private, mlp, train_step

SETTINGS: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "max_grad_norm": 0.5,
    "batch_size": 8,
    "backprop": layerwise(bound="exact"),
}


def private(**changed: Any) -> Private:
    return make_private(mlp(), **SETTINGS | changed)


def test_the_same_settings_load_in_silence(tmp_path: Path) -> None:
    saved, loaded = private(), private()
    train_step(saved)
    path = tmp_path / "checkpoint.pt"
    saved.engine.save_checkpoint(path=path, module=saved.handle, optimizer=saved.optimizer)
    loaded.engine.load_checkpoint(path=path, module=loaded.handle, optimizer=loaded.optimizer)
    assert loaded.engine.accountant.history == saved.engine.accountant.history


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"noise_multiplier": 2.0}, ["noise_multiplier was 1.0 and is 2.0"]),
        ({"max_grad_norm": 1.0}, ["max_grad_norm was 0.5 and is 1.0"]),
        (
            {"batch_size": 16},
            ["sample_rate was 0.25 and is 0.5", "expected_batch_size was 8 and is 16"],
        ),
        ({"loss_reduction": "sum"}, ["loss_reduction was 'mean' and is 'sum'"]),
        (
            {"backprop": layerwise(bound="product", allocation={"0": 1.0, "2": 2.0})},
            ["bound was 'exact' and is 'product'", "allocation was 'dimension' and is {'0': 1.0,"],
        ),
        ({"backprop": layerwise(bound="exact", max_input_norm=None)}, ["max_input_norm"]),
    ],
)
def test_other_settings_are_told(changed: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    saved, loaded = private(), private(**changed)
    path = tmp_path / "checkpoint.pt"
    saved.engine.save_checkpoint(path=path, module=saved.handle, optimizer=saved.optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.engine.load_checkpoint(
            path=path,
            module=loaded.handle,
            optimizer=loaded.optimizer,
            # Otherwise a model that does not clip its inputs refuses the weights already.
            module_load_dict_kwargs={"strict": False},
        )
    (warning,) = [w for w in caught if "The checkpoint was saved under" in str(w.message)]
    for text in told:
        assert text in str(warning.message)
    assert str(warning.message).count(" and is ") == len(told)


def test_other_settings_are_told_without_an_optimizer_too(tmp_path: Path) -> None:
    saved, loaded = private(), private(noise_multiplier=2.0)
    path = tmp_path / "checkpoint.pt"
    saved.engine.save_checkpoint(path=path, module=saved.handle, checkpoint_dict={"epoch": 3})
    with pytest.warns(UserWarning, match=r"settings: noise_multiplier was 1\.0 and is 2\.0\. The"):
        checkpoint = loaded.engine.load_checkpoint(path=path, module=loaded.handle)
    assert checkpoint["epoch"] == 3
    same = private()
    same.engine.load_checkpoint(path=path, module=same.handle)


def test_a_checkpoint_of_another_clipping_has_no_settings(tmp_path: Path) -> None:
    flat = make_private(mlp(), clipping="flat")
    path = tmp_path / "checkpoint.pt"
    flat.engine.save_checkpoint(path=path, module=flat.handle)
    loaded = private()
    loaded.engine.load_checkpoint(path=path, module=loaded.handle)


def test_the_state_fits_the_plain_optimizer_and_the_other_way_round() -> None:
    saved = private()
    train_step(saved)
    state = saved.optimizer.state_dict()
    torch.optim.SGD(mlp().parameters(), lr=1.0).load_state_dict(state)
    plain = torch.optim.SGD(mlp().parameters(), lr=0.7).state_dict()
    saved.optimizer.load_state_dict(plain)
    assert saved.optimizer.param_groups[0]["lr"] == 0.7
