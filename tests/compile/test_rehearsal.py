"""Compiled graphs are checked in eager mode on made-up examples, which changes nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_bpclip import PrivacyEngine, PrivacyViolationError
from opacus_bpclip.guard import rehearsal
from tests.budgets import layerwise
from tests.helpers import (
    CLASSES,
    FEATURES,
    Private,
    assert_refused_until_zero_grad,
    backward,
    batch,
    dataset,
    hand_over,
    loss_of,
    make_private,
    mlp,
    snapshot,
    train_step,
)
from tests.joint.compiled import Unasked
from tests.joint.helpers import joint


def compiled(private: Private, **options: Any) -> Private:
    options = {"backend": "aot_eager"} | options
    return private._replace(model=torch.compile(private.model, **options))


class Restless(nn.Module):
    """Draws numbers, counts its calls and keeps what it was called on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.latest = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = self.layer(x).detach()
        return self.head(self.drop(self.latest + self.layer(x)))


@pytest.mark.parametrize("clipping", [joint(), layerwise(uses={"layer": 2})], ids=["joint", "each"])
def test_a_rehearsal_leaves_no_trace(rehearsed, clipping):
    private = make_private(Restless(), backprop=clipping, counted=True)
    model, guard = private.handle._module, private.handle._guard
    fast = compiled(private, fullgraph=True)
    private.optimizer.zero_grad()
    backward(fast)
    left = [model.calls.clone(), model.latest.clone(), torch.get_rng_state()]
    sums = {watched.name: watched._collected.clone() for watched in guard.arrived}
    passes, before = vars(guard.passes).copy(), snapshot(model)
    waiting = len(guard.passes.samples._waiting)
    rehearsal.check_graphs(model, guard)
    assert len(rehearsed) == 1
    assert snapshot(model) == before
    for one, other in zip(left, [model.calls, model.latest, torch.get_rng_state()], strict=True):
        assert torch.equal(one, other)
    assert vars(guard.passes) == passes
    assert len(guard.passes.samples._waiting) == waiting
    assert private.steps == 0
    assert guard.violation is None
    for watched in guard.arrived:
        assert torch.equal(watched._collected, sums[watched.name])
        assert watched.arrivals == 1
    private.optimizer.step()
    assert private.steps == 1


@pytest.mark.parametrize("wrap_model", [True, False])
def test_a_rehearsal_leaves_the_watch_of_the_criterion_as_it_was(rehearsed, wrap_model):
    handle, optimizer, criterion, loader = PrivacyEngine().make_private(
        module=(inner := mlp()),
        optimizer=torch.optim.SGD(inner.parameters(), lr=0.0),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        clipping="backprop",
        wrap_model=wrap_model,
    )
    x, y = next((x, y) for x, y in loader if len(x) > 1)
    call = torch.compile(handle if wrap_model else inner, backend="aot_eager")
    criterion(call(x), y).backward()
    guard = handle._guard
    before = dict(vars(guard.loss))
    rehearsal.check_graphs(inner, guard)
    assert len(rehearsed) == 1
    assert vars(guard.loss) == before
    # Or a loss that goes around the criterion would be taken for one inside the graph.
    assert guard.loss.problem("0.weight") is not None
    optimizer.step()


def test_each_graph_is_rehearsed_once(rehearsed):
    private = make_private(mlp())
    fast = compiled(private)
    for _ in range(2):
        train_step(fast)
    assert len(rehearsed) == 1
    fast.model.eval()
    for _ in range(2):
        train_step(fast)
    assert [form.training for form in rehearsed] == [True, False]

    # A graph may have been traced with another form of call than an eager batch had.
    other = make_private(mlp())
    train_step(other)
    train_step(compiled(other))
    assert len(rehearsed) == 3


class Forms(nn.Module):
    """Uses its layer by a function in one of two ways of calling it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor, tied: bool = False) -> Tensor:
        y = self.layer(x)
        return nn.functional.linear(y, self.layer.weight) if tied else y


def _learn(private: Private, loss: Tensor) -> None:
    loss.backward()
    private.optimizer.step()


BY_FUNCTIONS = r"layer\.(weight|bias) (got gradient from outside its layer|is used by functions)"


@pytest.mark.parametrize(("wrap_model", "last"), [(True, "plain"), (False, "tied")])
def test_a_form_that_only_a_graph_has_seen_is_refused_for_its_reason(wrap_model, last):
    private = make_private(Forms(), backprop=joint(), wrap_model=wrap_model)
    fast = compiled(private, backend="aot_eager")
    train_step(fast)
    fast.optimizer.zero_grad()
    x, y = batch()
    hand_over(private, len(x))
    # The gradient is of the first call, whatever was called after it.
    loss = nn.functional.cross_entropy(fast.model(x, tied=True)[:, :CLASSES], y)
    if last == "plain":
        fast.model(x)
    with pytest.raises(PrivacyViolationError, match=BY_FUNCTIONS):
        _learn(fast, loss)
    assert private.steps == 1
    fast.optimizer.zero_grad()
    # Without torch.compile it trains, as the text says.
    nn.functional.cross_entropy(private.model(x, tied=True)[:, :CLASSES], y).backward()
    private.optimizer.step()
    assert private.steps == 2


class Doubled(torch.autograd.Function):
    """Hides a parameter from the mode that follows functions."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1e4 * Doubled.apply(self.layer.weight).sum()


@pytest.mark.parametrize("clipping", [joint(), layerwise()], ids=["joint", "each"])
def test_a_gradient_beside_a_layer_inside_the_graph_is_found(clipping):
    private = make_private(Beside(), backprop=clipping)
    private.handle._prober = Unasked()
    fast = compiled(private, backend="aot_eager")
    with pytest.raises(
        PrivacyViolationError, match=r"layer\.weight got gradient from outside its layer's call"
    ):
        backward(fast)
    with pytest.raises(PrivacyViolationError, match="not covered"):
        fast.optimizer.step()
    assert private.steps == 0


@dataclass
class Input:
    x: Tensor


class OfAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, given: Input) -> Tensor:
        return self.layer(given.x)


def test_what_cannot_be_rehearsed_is_refused_until_an_eager_batch_has_passed():
    private = make_private(OfAnObject())
    x, y = batch()
    fast = torch.compile(private.model, backend="aot_eager")

    def step(model: nn.Module) -> None:
        private.optimizer.zero_grad()
        hand_over(private, len(x))
        loss_of(model, Input(x), y).backward()
        private.optimizer.step()

    for _ in range(2):
        with pytest.raises(
            PrivacyViolationError,
            match=r"called in a way \(arguments, flags, numbers of axes, training or evaluation\) "
            r"that was never checked in eager mode.*Trying it on made-up examples "
            r"failed \(none could be made up for its arguments\).*"
            r"Run one batch of each way of calling it without torch\.compile first",
        ):
            step(fast)
    assert private.steps == 0
    step(private.model)
    step(fast)
    assert private.steps == 2


class Aside(nn.Module):
    """The loss uses more than what forward returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.other = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
        self.aside = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.aside = self.other(x)
        return self.layer(x)


def test_what_only_the_loss_reaches_is_refused_until_an_eager_batch_has_passed():
    private = make_private(Aside())
    x, y = batch()
    fast = torch.compile(private.model, backend="aot_eager")

    def step(model: nn.Module) -> None:
        private.optimizer.zero_grad()
        hand_over(private, len(x))
        out = model(x) + private.handle._module.aside
        nn.functional.cross_entropy(out, y).backward()
        private.optimizer.step()

    with pytest.raises(
        PrivacyViolationError,
        match=r"A compiled graph sent a gradient to other\.(weight|bias), but its layer's call "
        r"made none in eager mode.*run one batch without torch\.compile first",
    ):
        step(fast)
    step(private.model)
    step(fast)
    assert private.steps == 2


def test_a_refused_compiled_batch_is_refused_until_zero_grad():
    private = make_private(mlp())
    fast = compiled(private)
    backward(fast)
    private.handle._guard.forms._traced = dict.fromkeys(private.handle._guard.forms._traced)
    with pytest.raises(PrivacyViolationError, match="none could be made up for its arguments"):
        private.optimizer.step()
    assert_refused_until_zero_grad(private)
