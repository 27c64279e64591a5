"""Input clipping is a part of the model: in training, in evaluation, after export."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import clip_inputs, unclip_inputs
from tests.budgets import layerwise
from tests.helpers import (
    ByKeyword,
    Convolutional,
    Private,
    batch,
    make_private,
    mlp,
    train_step,
)


def outputs(model: nn.Module, grad: bool = False) -> Tensor:
    with torch.set_grad_enabled(grad):
        return model(batch()[0] * 10).detach()


def test_input_clipping_is_the_same_in_training_and_evaluation() -> None:
    private = make_private(mlp())
    training = outputs(private.model, grad=True)
    assert torch.equal(outputs(private.model), training)
    private.model.eval()
    assert torch.equal(outputs(private.model), training)
    assert not torch.equal(outputs(mlp()), training)


def alike(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are the same: one scales what the other makes of scaled inputs."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "export",
    [
        pytest.param(lambda private: private.handle.to_standard_module(), id="to_standard_module"),
        pytest.param(
            lambda private: private.handle.cleanup() or private.handle._module, id="cleanup"
        ),
    ],
)
def test_input_clipping_survives_export_until_it_is_taken_away(
    export: Callable[[Private], nn.Module],
) -> None:
    plain = mlp()
    private = make_private(plain)
    train_step(private)
    trained = outputs(private.model)
    exported = export(private)
    assert exported is plain
    assert alike(outputs(exported), trained)
    assert alike(outputs(exported, grad=True), trained)
    for p in exported.parameters():
        assert not vars(p).keys() & {"grad_sample", "summed_grad"}
    assert unclip_inputs(exported) is exported
    fresh = mlp()
    fresh.load_state_dict(exported.state_dict())
    assert torch.equal(outputs(exported), outputs(fresh))


@pytest.mark.parametrize("layers", ["all", "one"])
def test_freezing_before_export_keeps_input_clipping(layers: str) -> None:
    model = mlp()
    private = make_private(model)
    trained = outputs(private.model)
    (model if layers == "all" else model[0]).requires_grad_(False)
    assert alike(outputs(private.handle.to_standard_module()), trained)


def test_export_keeps_input_clipping_of_layers_called_by_keyword() -> None:
    private = make_private(ByKeyword())
    trained = outputs(private.model)
    assert alike(outputs(private.handle.to_standard_module()), trained)


def test_a_model_without_input_clipping_exports_as_it_was() -> None:
    private = make_private(mlp(), backprop=layerwise(max_input_norm=None))
    assert torch.equal(outputs(private.handle.to_standard_module()), outputs(mlp()))


def test_clip_inputs_equals_what_private_training_does() -> None:
    private = make_private(mlp(), backprop=layerwise(max_input_norm=0.5))
    alone = clip_inputs(clip_inputs(mlp(), 2.0), 0.5)
    assert alike(outputs(alone), outputs(private.model))
    with pytest.raises(
        ValueError, match=r"^Expected max_input_norm=0 to be a finite number > 0\.$"
    ):
        clip_inputs(alone, 0)
    assert alike(outputs(alone), outputs(private.model))
    assert torch.equal(outputs(unclip_inputs(alone)), outputs(mlp()))


def test_private_training_replaces_input_clipping_that_is_there() -> None:
    already = make_private(clip_inputs(mlp(), 0.5), backprop=layerwise(max_input_norm=2.0))
    fresh = make_private(mlp(), backprop=layerwise(max_input_norm=2.0))
    assert torch.equal(outputs(already.model), outputs(fresh.model))


def reload(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle"),
        pytest.param(reload, id="torch.save"),
    ],
)
@pytest.mark.parametrize("make", [mlp, Convolutional], ids=["linear", "conv"])
def test_a_model_that_clips_its_inputs_can_be_copied(
    make: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    x = torch.linspace(-50, 50, 24).view(6, 4)
    model = make()
    plain = model(x)
    copied = duplicate(clip_inputs(model, 1.0))
    assert torch.equal(copied(x), model(x))
    assert not torch.equal(copied(x), plain)
    assert torch.equal(unclip_inputs(copied)(x), plain)


def test_a_copy_of_a_private_model_evaluates_like_it() -> None:
    # As an exponential moving average of the weights needs it.
    private = make_private(mlp())
    train_step(private)
    copied = copy.deepcopy(private.model)
    expected = outputs(private.model)
    train_step(private)
    assert torch.equal(outputs(copied), expected)
    assert not torch.equal(outputs(private.model), expected)


def test_a_state_dict_goes_through_a_file_into_model_and_wrapper() -> None:
    private = make_private(mlp())
    train_step(private)
    buffer = io.BytesIO()
    torch.save(private.model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    # Opacus prefixes the keys of a wrapped model in this way.
    assert all(key.startswith("_module.") for key in state)
    other = make_private(mlp())
    other.model.load_state_dict(state)
    assert torch.equal(outputs(other.model), outputs(private.model))
    unwrapped = make_private(mlp(), wrap_model=False).model
    unwrapped.load_state_dict({key.removeprefix("_module."): v for key, v in state.items()})
    assert torch.equal(outputs(unwrapped), outputs(private.model))
