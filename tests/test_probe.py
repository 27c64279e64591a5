"""What the search for coupled examples finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import CLASSES, FEATURES
from tests.probing import Middle, Returning, found


@pytest.mark.parametrize("strength", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_weak_coupling_is_found(strength: float) -> None:
    assert "couples examples" in (found(Middle(lambda h: h + strength * h.mean(dim=0))) or "")


class Single(nn.Module):
    """Insists on float32, as code with a dtype of its own does."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength
        self.body = nn.Linear(FEATURES, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        assert h.dtype == torch.float32
        return h + self.strength * h.mean(dim=0)


@pytest.mark.parametrize(("strength", "coupled"), [(1e-2, True), (1e-3, True), (0.0, False)])
def test_a_model_that_runs_in_single_precision_only_is_searched_there(
    strength: float, coupled: bool
) -> None:
    assert bool(found(Single(strength))) is coupled


def test_a_frozen_backbone_in_half_precision_is_searched_for_what_can_be_seen() -> None:
    class Half(nn.Module):
        def __init__(self, strength: float) -> None:
            super().__init__()
            self.backbone = nn.Linear(FEATURES, 8, dtype=torch.bfloat16).requires_grad_(False)
            self.head, self.strength = nn.Linear(8, CLASSES), strength

        def forward(self, x: Tensor) -> Tensor:
            h = self.backbone(x.to(torch.bfloat16)).to(self.head.weight.dtype)
            return self.head(h + self.strength * h.mean(dim=0))

    torch.manual_seed(0)
    assert found(Half(1.0))
    assert found(Half(0.0)) is None


@pytest.mark.parametrize(
    "couple",
    [
        pytest.param(lambda h: h + h.amax(dim=0), id="largest of the batch"),
        pytest.param(lambda h: h.cumsum(dim=0), id="running sum"),
        pytest.param(lambda h: h.flip(0).cumsum(dim=0).flip(0), id="running sum from the end"),
        pytest.param(lambda h: h + h[:1], id="first example"),
        pytest.param(lambda h: h + h[-1:], id="last example"),
        pytest.param(lambda h: h + h.roll(2, dims=0), id="half a batch away"),
        pytest.param(lambda h: h + h.view(-1, 2, 8).flip(1).view(-1, 8), id="pairs"),
        pytest.param(lambda h: torch.cat([h[:1] + h[1:].sum(dim=0), h[1:]]), id="one row only"),
        pytest.param(lambda h: h * (1 / h.norm()).clamp(max=1.0), id="norm of the batch"),
        pytest.param(lambda h: h + h.sort(dim=0).values, id="sorted batch"),
        pytest.param(lambda h: h + torch.arange(len(h))[:, None], id="place in the batch"),
        pytest.param(lambda h: h / len(h), id="size of the batch"),
        pytest.param(lambda h: h * (len(h) > 2), id="large batches alone"),
        pytest.param(lambda h: h + (h.abs().amax() > 5.0), id="outliers alone"),
        pytest.param(lambda h: h + F.dropout(h, 0.5).mean(dim=0), id="mean after dropout"),
        pytest.param(lambda h: h.lerp(h[torch.randperm(len(h))], 0.2), id="mixup"),
    ],
)
def test_coupling_of_every_kind_is_found(couple: Callable[[Tensor], Tensor]) -> None:
    assert (found(Middle(couple)) or "").startswith("(root) (Middle) couples examples: ")


def test_the_deepest_module_is_named() -> None:
    inner = nn.Sequential(
        nn.Linear(FEATURES, FEATURES), nn.Sequential(Middle(lambda h: h - h.mean(0)))
    )
    assert (found(nn.Sequential(inner, mlp_of(CLASSES))) or "").startswith("0.1.0 (Middle) couples")


def mlp_of(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))


def test_a_head_that_starts_at_zero_hides_nothing() -> None:
    model = Middle(lambda h: h + h.mean(dim=0))
    nn.init.zeros_(model.head.weight)
    assert found(model)


def test_a_gate_that_starts_at_zero_hides_nothing() -> None:
    class Gated(Middle):
        def __init__(self) -> None:
            super().__init__(lambda h: h)
            self.gate = nn.Linear(8, 8)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h + self.gate(h - h.mean(dim=0)))

    assert found(Gated())


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda y: (y, None, "text"), id="tuple"),
        pytest.param(lambda y: {"logits": [y]}, id="nested"),
        pytest.param(lambda y: Output(y), id="dataclass"),
        pytest.param(lambda y: Named(y, 3), id="named tuple"),
        pytest.param(lambda y: Plain(y), id="object"),
    ],
)
@pytest.mark.parametrize("coupled", [True, False])
def test_outputs_of_any_structure_are_looked_into(
    wrap: Callable[[Tensor], Any], coupled: bool
) -> None:
    model = Returning(lambda y: wrap(y - coupled * y.mean(dim=0)))
    assert bool(found(model)) is coupled


@dataclasses.dataclass
class Output:
    logits: Tensor


class Named(NamedTuple):
    logits: Tensor
    number: int


class Plain:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("returned", ["mean", "sum"])
def test_a_loss_inside_the_model_must_be_what_loss_reduction_says(
    reduction: str, returned: str
) -> None:
    model = Returning(lambda y: getattr(y.square(), returned)())
    problem = found(model, loss_reduction=reduction)
    assert (problem is None) is (reduction == returned)
    if problem:
        assert f"not the {reduction} of its values for each example alone" in problem


def test_what_cannot_be_repeated_is_said_to_be_that() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * self.calls

    model = nn.Sequential(nn.Linear(FEATURES, 8), Counting())
    assert (found(model) or "").startswith("The model returned other numbers when it was run on")
