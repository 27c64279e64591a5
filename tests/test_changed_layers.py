"""A layer that computes something else than when it was examined is refused on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyViolationError
from tests.helpers import FEATURES, Private, batch, make_private, one_layer, summed

OTHER = (
    "{name} was changed after make_private (its forward was replaced, an option was set, or a "
    "parametrization was added): its rule no longer describes it. Change the model first, then "
    "call make_private."
)
REPLACED = (
    "{name} is not the parameter that make_private saw: it was replaced, it is computed from "
    "another (functional_call, spectral_norm), or the module's forward calls the module. Change "
    "the model first, then call make_private."
)


def contributes(private: Private, output: Tensor) -> float:
    """Train on one example, which saturates the bound: return how much it contributed."""
    (1e3 * output).sum().backward()
    private.optimizer.step()
    return float(summed(private).norm())


def assert_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(PrivacyViolationError) as refusal:
        call()
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("layer", "x", "change"),
    [
        # Each of these made one example contribute up to 95 times its limit, or mixed examples.
        pytest.param(
            nn.LayerNorm(FEATURES, eps=1e6),
            100 * batch(1)[0],
            lambda layer: setattr(layer, "eps", 1e-5),
            id="eps",
        ),
        pytest.param(
            nn.Embedding(4, 1),
            torch.zeros(1, 4, dtype=torch.long),
            lambda layer: setattr(layer, "scale_grad_by_freq", True),
            id="scale_grad_by_freq",
        ),
        pytest.param(
            nn.Conv1d(2, 2, 1, bias=False),
            torch.ones(1, 2, 4),
            lambda layer: setattr(layer, "groups", 2),
            id="groups",
        ),
    ],
)
def test_an_option_that_is_set_later_is_refused(
    layer: nn.Module, x: Tensor, change: Callable[[nn.Module], None]
) -> None:
    private = make_private(layer, data=TensorDataset(x.repeat(32, *(1,) * (x.dim() - 1))))
    assert contributes(private, private.model(x)) <= 1.0
    private.optimizer.zero_grad()
    change(layer)
    assert_refused(lambda: private.model(x), OTHER.format(name="(root)"))


def test_a_class_that_is_patched_later_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    private = make_private(one_layer())
    monkeypatch.setattr(
        nn.Linear, "forward", lambda layer, x: F.linear(100 * x, layer.weight, layer.bias)
    )
    assert_refused(lambda: private.model(batch(1)[0]), OTHER.format(name="0"))


class Scaled(nn.Linear):
    scale = 1.0

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * self.scale if name == "weight" and self.scale != 1.0 else value


def scaled_weight(model: nn.Module, x: Tensor) -> Tensor:
    model[0].scale = 100.0
    return model(x)


def called_with_other_parameters(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.functional_call(model, {"0.weight": 100 * model[0].weight}, (x,))


def normalized_weight(model: nn.Module, x: Tensor) -> Tensor:
    spectral_norm(model[0])
    return model(x)


def pruned_weight(model: nn.Module, x: Tensor) -> Tensor:
    prune.l1_unstructured(model[0], "weight", 1)
    return model(x)


def assigned_state(model: nn.Module, x: Tensor) -> Tensor:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model(x)


def swapped_by_a_hook(model: nn.Module, x: Tensor) -> Tensor:
    def swap(layer: nn.Module, args: Any) -> None:
        weight = layer._parameters.pop("weight")
        layer.weight = 100 * weight

    model[0].register_forward_pre_hook(swap)
    return model(x)


@pytest.mark.parametrize(
    "call",
    [
        scaled_weight,
        called_with_other_parameters,
        normalized_weight,
        pruned_weight,
        assigned_state,
        swapped_by_a_hook,
    ],
    ids=lambda call: call.__name__,
)
def test_a_weight_that_is_computed_from_the_parameter_is_refused(
    call: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    # The chain rule scales the clipped gradient on its way to the parameter.
    model = nn.Sequential(Scaled(FEATURES, 3))
    private = make_private(model, wrap_model=False)
    assert contributes(private, model(batch(1)[0])) <= 1.0
    private.optimizer.zero_grad()
    assert_refused(lambda: call(model, batch(1)[0]), REPLACED.format(name="0.weight"))
    with pytest.raises(PrivacyViolationError, match="not covered by the guarantee"):
        private.optimizer.step()
