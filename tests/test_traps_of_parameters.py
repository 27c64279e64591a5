"""Models in which the rule of a layer does not see all uses of its parameters.

Each is refused with the reason and a remedy, or bounded by the functions that use the parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.budgets import layerwise
from tests.followed import check_followed
from tests.helpers import (
    CLASSES,
    FEATURES,
    Switchable,
    assert_refused_until_zero_grad,
    backward,
    make_private,
    mlp,
    switchable,
    train_step,
    tricked,
)
from tests.traps import HEADER, refused_before_training

DIRECT = (
    "Use the parameter through its layer only, not directly as F.linear(x, layer.weight) does. In "
    "place of a penalty on the weights in the loss, give the optimizer weight_decay, or shrink the "
    "weights after its step"
)


def refused_on_the_batch(trick: Callable[[Switchable, Tensor], object], message: str) -> None:
    private = switchable(lr=1.0)
    train_step(private)
    private.optimizer.zero_grad()
    with pytest.raises(PrivacyViolationError) as refusal:
        tricked(trick)(private)
    assert str(refusal.value) == message
    assert_refused_until_zero_grad(private)


# A parameter that its layer's rule never sees


def test_bypass_beside_the_layer() -> None:
    refused_on_the_batch(
        lambda m, x: m.head(h := m.body(x)) + F.linear(h, m.head.weight),
        f"head.weight got gradient from outside its layer's call, and nothing bounds it. {DIRECT}.",
    )


def test_bypass_in_place_of_the_layer() -> None:
    refused_on_the_batch(
        lambda m, x: F.linear(m.body(x), m.head.weight),
        f"head.weight got gradient from outside its layer's call, and nothing bounds it. {DIRECT}.",
    )


def test_multihead_attention_bypasses_its_own_layer() -> None:
    # out_proj is a Linear, but nn.MultiheadAttention reads its weight and never calls it.
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0].mean(dim=1)

    refused_before_training(
        Attention(),
        f"{HEADER}attention (MultiheadAttention): no rule bounds the gradient of in_proj_weight, "
        "in_proj_bias. "
        'PrivacyEngine.get_compatible_module(model, clipping="backprop") replaces it. '
        "Or freeze it (requires_grad=False).",
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Unknown(nn.Module):
    """A user's layer: a matrix product, but not nn.Linear's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Bypassed(nn.Module):
    """Always multiplies with its layer's weight once more, beside the layer's call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.layer(x)), self.layer.weight)


def linear() -> nn.Linear:
    return nn.Linear(FEATURES, FEATURES)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        # PyTorch announces the removal of the old style, which models in use still have.
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated")
        return weight_norm(linear())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(Scale, id="raw parameter"),
        pytest.param(lambda: Unknown(FEATURES), id="unknown layer"),
        pytest.param(lambda: Doubled(FEATURES, FEATURES), id="overridden forward"),
        pytest.param(Bypassed, id="bypass in every batch"),
        # The weight is not the parameter, but what each forward pass computes from others.
        pytest.param(old_weight_norm, id="weight norm of the old style"),
        pytest.param(lambda: parametrized_weight_norm(linear()), id="weight norm"),
        pytest.param(lambda: spectral_norm(linear()), id="spectral norm"),
        pytest.param(lambda: prune.l1_unstructured(linear(), "weight", 0.5), id="pruning"),
    ],
)
def test_a_parameter_without_a_rule_is_bounded_by_the_functions_that_meet_it(
    make: Callable[[], nn.Module],
) -> None:
    check_followed(lambda: nn.Sequential(make(), *mlp()))


def replace_the_head(model: Switchable) -> None:
    model.head = nn.Linear(model.head.in_features, model.head.out_features)


def wrap_the_head(model: Switchable) -> None:
    model.head = nn.Sequential(nn.Linear(model.head.in_features, 3), nn.Linear(3, 3))


@pytest.mark.parametrize("backprop", [BackpropClipping(), layerwise()], ids=["joint", "layerwise"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            replace_the_head,
            "head.weight is not the parameter that make_private saw: it was replaced, it is "
            "computed from another (functional_call, spectral_norm), or the module's forward "
            "calls the module. Change the model first, then call make_private.",
        ),
        (
            wrap_the_head,
            "head.0.weight was not a parameter of the model when make_private was called, so its "
            "gradient is not clipped. Call cleanup() on the private model, add it, then call "
            "make_private again; or freeze it.",
        ),
    ],
)
def test_a_layer_that_is_new(
    change: Callable[[Switchable], None], said: str, backprop: BackpropClipping
) -> None:
    model = Switchable()
    private = make_private(model, backprop=backprop)
    head = model.head
    train_step(private)
    private.optimizer.zero_grad()
    change(model)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == said
    model.head = head
    assert_refused_until_zero_grad(private)


def test_a_layer_that_is_new_and_frozen() -> None:
    model = Switchable()
    private = make_private(model)
    model.add_module("extra", nn.Linear(CLASSES, CLASSES).requires_grad_(False))
    model.trick = lambda own, x: own.extra(own.head(torch.relu(own.body(x))))
    train_step(private)
    assert private.steps == 1


def test_unfrozen_later() -> None:
    model = Switchable()
    model.head.bias.requires_grad_(False)
    private = make_private(model)
    train_step(private)
    private.optimizer.zero_grad()
    model.head.bias.requires_grad_(True)
    with pytest.raises(PrivacyViolationError) as refusal:
        backward(private)
    assert str(refusal.value) == (
        "head.bias was frozen when make_private was called and has been unfrozen since, so its "
        "gradient is not clipped. Unfreeze it first, then call make_private again."
    )
    model.head.bias.requires_grad_(False)
    assert_refused_until_zero_grad(private)


def test_used_twice_undeclared() -> None:
    refused_on_the_batch(
        lambda m, x: m.head(m.body(x)) + m.head(torch.tanh(m.body(x))),
        "body is used more than once in a forward pass: each use adds to one example's "
        "contribution, and the bound counts 1. Give each use its own layer, or declare how many "
        "there are: BackpropClipping(uses={'body': ...}).",
    )


# A weight that the forward pass changes


def edit_data(m: Switchable, x: Tensor) -> Tensor:
    m.head.weight.data.mul_(1 + x.mean())
    return m.head(m.body(x))


def edit_without_grad(m: Switchable, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.head.weight.mul_(1 + x.mean())
    return m.head(m.body(x))


EDITED = (
    "head.weight was changed by the model's own forward pass. What the parameter learns about a "
    "batch in this way is neither bounded nor noised. Compute with a changed copy of it, in a "
    "module with a rule, or change it between steps, from public values."
)


@pytest.mark.parametrize("edit", [edit_data, edit_without_grad], ids=["data", "no_grad"])
def test_weight_edited_in_the_forward_pass(
    edit: Callable[[Switchable, Tensor], Tensor],
) -> None:
    model = Switchable()
    model.trick = edit
    before = model.head.weight.clone()
    refused_before_training(model, EDITED)
    assert torch.equal(model.head.weight, before)


def test_weight_edited_in_a_later_forward_pass() -> None:
    refused_on_the_batch(edit_without_grad, EDITED)
