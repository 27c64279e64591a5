"""Traps that keep a parameter from its layer's rule: each is refused, with reason and remedy."""

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

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.rules import supported_layers
from tests.helpers import (
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

REMEDIES = (
    f"Freeze it (requires_grad=False), build the model from supported layers "
    f"({', '.join(supported_layers())}), or write a rule for it and register that with "
    "opacus_bpclip.register_rule."
)
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
        f'PrivacyEngine.get_compatible_module(model, clipping="backprop") replaces it. {REMEDIES}',
    )


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_raw_parameter() -> None:
    refused_before_training(
        nn.Sequential(Scale(), *mlp()),
        f"{HEADER}0 (Scale): no rule bounds the gradient of gain. {REMEDIES}",
    )


class Unknown(nn.Module):
    """A layer of somebody's own: a matrix product, but not nn.Linear's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.eye(features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


def test_unknown_layer() -> None:
    refused_before_training(
        nn.Sequential(Unknown(FEATURES), *mlp()),
        f"{HEADER}0 (Unknown): no rule bounds the gradient of table. {REMEDIES}",
    )


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_overridden_forward() -> None:
    refused_before_training(
        nn.Sequential(Doubled(FEATURES, FEATURES), *mlp()),
        f"{HEADER}0 (Doubled): overrides Linear.forward, so the rule for Linear says nothing about "
        "it. Use Linear itself and put the extra work in a module around it.",
    )


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
        "head.bias was frozen when make_private was called and has been unfrozen since: nothing "
        "clips its gradient. Unfreeze it first, then call make_private again."
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


# A weight that is not what the layer multiplies with

REWRITTEN = (
    "are not Linear's own; a reparametrization (weight_norm, spectral_norm, pruning) rewrites the "
    "weight in the forward pass, outside what the rule bounds. Remove it."
)


def test_weight_norm_old_style() -> None:
    with warnings.catch_warnings():
        # PyTorch announces the removal of the old style, which models in use still have.
        warnings.filterwarnings("ignore", message=".*weight_norm.* is deprecated")
        layer = weight_norm(nn.Linear(FEATURES, FEATURES))
    refused_before_training(
        nn.Sequential(layer, *mlp()),
        f"{HEADER}0 (Linear): its parameters weight_g, weight_v {REWRITTEN}",
    )


def test_pruning() -> None:
    layer = prune.l1_unstructured(nn.Linear(FEATURES, FEATURES), "weight", 0.5)
    refused_before_training(
        nn.Sequential(layer, *mlp()),
        f"{HEADER}0 (Linear): its parameters weight_orig {REWRITTEN}",
    )


@pytest.mark.parametrize(
    ("parametrize", "originals"),
    [
        pytest.param(parametrized_weight_norm, "original0, original1", id="weight norm"),
        pytest.param(spectral_norm, "original", id="spectral norm"),
    ],
)
def test_parametrization(parametrize: Callable[[nn.Module], nn.Module], originals: str) -> None:
    refused_before_training(
        nn.Sequential(parametrize(nn.Linear(FEATURES, FEATURES)), *mlp()),
        f"{HEADER}0.parametrizations.weight (ParametrizationList): no rule bounds the gradient of "
        f"{originals}. {REMEDIES}",
    )


def edit_data(m: Switchable, x: Tensor) -> Tensor:
    m.head.weight.data.mul_(1 + x.mean())
    return m.head(m.body(x))


def edit_without_grad(m: Switchable, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.head.weight.mul_(1 + x.mean())
    return m.head(m.body(x))


EDITED = (
    "head.weight was changed by the model's own forward pass: what it takes up from a batch is "
    "neither bounded nor noised. Compute with a changed copy of it, in a module with a rule, or "
    "change it between steps, from public values."
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
