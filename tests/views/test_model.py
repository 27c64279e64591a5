"""`FoldViews`: shapes, the user's loop, every way to read a loader, and what is followed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import BackpropClipping, FoldViews
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.helpers import flat
from tests.views.training import CLASSES, VIEWS, cnn, data, private


def trained(way: str, **options: Any) -> Tensor:
    """Return the parameters after two epochs of the user's loop."""
    inner, criterion = cnn(), nn.CrossEntropyLoss()
    torch.manual_seed(1)
    if way in ("criterion", "padded"):
        options["criterion"] = criterion
    if way == "padded":
        options["physical_batch_size"] = 4
    fixed = TensorDataset(*map(torch.stack, zip(*data(), strict=True)))
    model, optimizer, *criteria, loader = private(FoldViews(inner, VIEWS), fixed, **options)
    criterion = criteria[0] if criteria else criterion

    def epoch(batches: Any) -> None:
        for x, y in batches:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

    for _ in range(2):
        if way == "physical batches":
            with BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=2, optimizer=optimizer
            ) as parts:
                epoch(parts)
        else:
            epoch(loader)
    return flat(inner.parameters())


@pytest.mark.parametrize("way", ["criterion", "physical batches", "padded"])
@pytest.mark.parametrize("allocation", ["joint", "dimension"])
def test_every_way_to_read_and_to_sum_trains_the_same(allocation: str, way: str) -> None:
    options = {"backprop": BackpropClipping(allocation=allocation)}
    plain = trained("plain", **options)
    assert (plain - flat(cnn().parameters())).norm() > 0.1
    assert (trained(way, **options) - plain).norm() < 1e-5


def test_a_sum_adds_the_views_up_and_stays_within_its_sensitivity() -> None:
    model, optimizer, loader = private(FoldViews(cnn(), VIEWS), data(), loss_reduction="sum")
    optimizer.keep_summed_grad = True
    x, y = next(batch for batch in loader if len(batch[0]))
    nn.CrossEntropyLoss(reduction="sum")(model(x), y).backward()
    optimizer.step()
    assert 0 < flat(p.summed_grad for p in model.parameters()).norm() <= 0.1 * len(x)


def test_in_evaluation_the_model_is_what_it_is_alone() -> None:
    inner = cnn()
    fold = FoldViews(inner, VIEWS)
    x = torch.randn(5, VIEWS, 1, 6, 6)
    assert fold(x).shape == (5, CLASSES, VIEWS)
    assert torch.allclose(fold(x)[2, :, 1], inner(x[2, 1:2])[0], atol=1e-6)
    assert torch.equal(fold.eval()(x[:, 0]), inner(x[:, 0]))
    assert not FoldViews(cnn().eval(), VIEWS).training
    assert FoldViews(nn.Conv2d(1, 2, 3), 2)(x[:, :2]).shape == (5, 2, 4, 4, 2)


def test_arguments_by_keyword_are_folded_and_others_passed_on() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: Tensor, plus: int = 0) -> Tensor:
            return x * by + plus

    x = torch.randn(2, 3, 4)
    assert torch.equal(FoldViews(Scaled(), 3)(x, by=x, plus=1), (x * x + 1).movedim(1, -1))


def test_a_copy_trains_as_the_original() -> None:
    model, optimizer, loader = private(FoldViews(cnn(), VIEWS), data())
    made = [(model, optimizer, loader), copy.deepcopy((model, optimizer, loader))]
    begin = loader.generator.get_state()
    for own, step, batches in made:
        loader.generator.set_state(begin)  # which the copy shares
        for x, y in batches:
            step.zero_grad()
            nn.CrossEntropyLoss()(own(x), y).backward()
            step.step()
    found = [flat(own.parameters()) for own, _, _ in made]
    assert torch.equal(*found)
    made[1][0].eval()
    assert model(torch.zeros(4, VIEWS, 1, 6, 6)).shape == (4, CLASSES, VIEWS)


class Windows(nn.Module):
    """Folds two parts of each row into the batch once more."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = nn.Linear(18, 5), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.tanh(self.part(x.reshape(2 * len(x), 18)))
        return self.head(parts.view(len(x), 10))


class Scaled(nn.Module):
    """Has a parameter outside of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(36)), nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) * self.scale)


class ScaledRule(BroadcastRule):
    """A rule of the user's for the parameter above."""

    parameters = ("scale",)
    dims: ClassVar = {"scale": 2}


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("make", [Windows, Scaled])
def test_functions_are_followed_where_a_rule_has_no_form_for_views(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], registered: bool
) -> None:
    if registered:
        monkeypatch.setitem(RULES, Scaled, ScaledRule)
    torch.manual_seed(0)
    inner = make()
    plain = copy.deepcopy(inner)
    model, optimizer, loader = private(FoldViews(inner, VIEWS), data())
    optimizer.keep_summed_grad = True
    x, y = next(batch for batch in loader if len(batch[0]) > 2)
    nn.CrossEntropyLoss()(model(x), y).backward()
    optimizer.step()
    found = flat(p.summed_grad for p in inner.parameters())
    total = torch.zeros_like(found)
    for views, labels in zip(x, y, strict=True):
        loss = nn.functional.cross_entropy(plain(views), labels)
        gradient = flat(torch.autograd.grad(loss, list(plain.parameters())))
        total += gradient * min(1.0, 0.1 / float(gradient.norm()))
    assert (found - total).norm() < 1e-4 * total.norm()
