"""Whether a layer has changed since its examination: the quick comparison, and the full one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from opacus.layers import DPMultiheadAttention
from torch import nn

from opacus_bpclip.model.coverage import trainable_layers
from opacus_bpclip.model.layer import Layer
from opacus_bpclip.rules import LinearRule
from opacus_bpclip.rules.base import trainable


def only(module: nn.Module) -> Layer:
    return trainable_layers(module)["(root)"]


def edit_padding(layer: nn.Module) -> None:
    padding = cast("list[int]", layer._reversed_padding_repeated_twice)
    padding[0] += 1


CHANGES = [
    pytest.param(nn.Linear(2, 2), lambda m: setattr(m, "in_features", 3), id="a number"),
    pytest.param(nn.Conv2d(2, 2, 3), lambda m: setattr(m, "stride", (2, 1)), id="a tuple"),
    pytest.param(nn.Conv2d(2, 2, 3, padding="same"), edit_padding, id="a list, within"),
    pytest.param(nn.Linear(2, 2), lambda m: setattr(m, "forward", m.forward), id="a method"),
]


@pytest.mark.parametrize(("module", "change"), CHANGES)
def test_what_is_changed_is_seen(module: nn.Module, change: Callable[[nn.Module], None]) -> None:
    layer = only(module)
    assert not layer.is_patched
    change(module)
    assert layer.is_patched


def test_the_quick_look_is_taken_and_spares_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = only(nn.Linear(2, 2))

    def asked(_: nn.Module) -> LinearRule:
        raise AssertionError

    monkeypatch.setattr(LinearRule, "from_module", asked)
    assert not layer.is_patched


def test_a_changed_mode_that_the_rule_does_not_care_about_is_no_change() -> None:
    module = nn.Linear(2, 2)
    layer = only(module)
    module.eval()
    module.note = ["something of the user's"]
    assert not layer.is_patched


def test_layers_with_parts_are_always_asked() -> None:
    attention = DPMultiheadAttention(4, 2, add_bias_kv=True)
    layers = trainable_layers(attention, batch_first=False)
    assert layers["out_proj"].state is not None
    assert only(nn.Sequential(nn.Linear(1, 1))[0]).state is not None
    module = nn.Linear(1, 1)
    module.part = nn.Identity()
    assert only(module).state is None
    module = nn.Linear(1, 1)
    module.register_buffer("scale", torch.ones(1))
    assert only(module).state is None


class Computing(nn.Embedding):
    """An option that is no attribute: it may follow from anything."""

    frequent = False

    @property
    def scale_grad_by_freq(self) -> bool:
        return Computing.frequent

    @scale_grad_by_freq.setter
    def scale_grad_by_freq(self, value: bool) -> None:
        """Leave it."""


def test_classes_of_a_users_own_are_always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = only(Computing(2, 2))
    assert layer.state is None
    assert not layer.is_patched
    monkeypatch.setattr(Computing, "frequent", True)
    assert layer.is_patched


@dataclass(frozen=True)
class ScaledRule(LinearRule):
    """A rule that reads more than attributes: what an object holds."""

    scale: float = 1.0

    @classmethod
    def from_module(cls, module: nn.Module) -> ScaledRule:
        layer = cast(nn.Linear, module)
        return cls(
            weight=trainable(layer, "weight"),
            bias=trainable(layer, "bias"),
            in_features=layer.in_features,
            scale=float(cast("list[float]", module.options)[0]),
        )


def test_rules_of_a_users_own_are_always_asked() -> None:
    module = nn.Linear(2, 2)
    module.options = [1.0]
    layer = Layer.of(
        "0",
        module,
        ScaledRule.from_module(module),
        dict(module.named_parameters()),
        batch_axis=0,
    )
    assert layer.state is None
    assert not layer.is_patched
    module.options[0] = 2.0
    assert layer.is_patched
