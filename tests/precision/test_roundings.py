"""Where a model or a loop rounds by itself: no sum over the batch, no mean goes through that."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from opacus_bpclip import BackpropClipping, PrivacyViolationError, register_rule
from opacus_bpclip.rules import RULES, LinearRule
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, joint, linear_loss

LOW = torch.bfloat16
MANY = 256
BUDGETS = pytest.mark.parametrize(
    "clipping", [BackpropClipping(), layerwise(bound="exact")], ids=["joint", "layerwise"]
)


class Own(nn.Module):
    """A user's layer with a rule, which converts its numbers to low precision itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.in_features = 4
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "autocast":
            with torch.autocast("cpu", LOW):
                return F.linear(x, self.weight, self.bias).float()
        x = F.dropout(x) if self.way == "dropout" else x
        return F.linear(x.to(LOW), self.weight.to(LOW), self.bias.to(LOW)).float()


@pytest.fixture(autouse=True)
def _with_a_rule():
    register_rule(Own)(LinearRule)
    torch.manual_seed(0)
    yield
    del RULES[Own]


def _batch(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 4), torch.randn(count, 3)


@BUDGETS
@pytest.mark.parametrize("way", ["autocast", "cast"])
@pytest.mark.parametrize("outside", [False, True], ids=["float32", "autocast outside"])
def test_a_layer_that_rounds_by_itself_is_summed_in_float32(clipping, way, outside):
    model = nn.Sequential(Own(way))
    trainer = Trainer(model, (4,), clipping, reduction="sum", dtype=torch.float32, autocast=outside)
    check_independence(trainer, *_batch(MANY))
    assert joint(trainer.released(torch.ones(1, 4), torch.full((1, 3), 1e4))).norm() <= 1


def test_its_gradient_is_that_of_the_numbers_that_it_drew():
    model = nn.Sequential(Own("dropout"))
    trainer = Trainer(
        model, (4,), BackpropClipping(), reduction="sum", dtype=torch.float32, max_grad_norm=1e6
    )
    x, target = torch.ones(1, 4), torch.ones(1, 3)
    trainer.optimizer.zero_grad()
    out = trainer.model(x)
    linear_loss(out, target, "sum").backward()
    trainer.optimizer.step()
    weight, bias = model[0].weight, model[0].bias
    made = (weight.summed_grad[0] * weight.to(LOW).float()).sum(1) + bias.to(LOW).float()
    torch.testing.assert_close(out[0].detach(), made.detach(), rtol=0.05, atol=0.1)


class Derived(nn.Module):
    """A weight that is rounded before it meets the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.to(LOW).float())


class Rounded(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.to(LOW).float()


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "weight", Rounded())
    return layer


@pytest.mark.parametrize("make", [Derived, parametrized, lambda: Own("cast")])
def test_a_mean_through_what_rounds_by_itself_is_refused(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    trainer = Trainer(model, (4,), BackpropClipping(), dtype=torch.float32)
    with pytest.raises(PrivacyViolationError, match="bfloat16, and the loss is a mean"):
        trainer.step(*_batch(3))


@pytest.mark.parametrize("make", [Derived, parametrized])
def test_a_sum_through_it_trains(make):
    model = nn.Sequential(nn.Linear(4, 4), make())
    trainer = Trainer(model, (4,), BackpropClipping(), dtype=torch.float32, reduction="sum")
    check_independence(trainer, *_batch(32))


def _plain(**options) -> Trainer:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return Trainer(model, (4,), BackpropClipping(), dtype=torch.float32, **options)


def test_a_mean_that_is_rounded_outside_of_the_model_is_refused():
    trainer = _plain()
    x, target = _batch(60)
    loss = F.mse_loss(trainer.model(x).to(LOW).float(), target)
    with pytest.raises(PrivacyViolationError, match="The loss computes in"):
        loss.backward()


def test_losses_whose_gradients_are_round_numbers_are_let_through():
    trainer = _plain()
    x, _ = _batch(3)
    for loss in (lambda y: y.sum() / 3, lambda y: y.abs().mean(), lambda y: 0 * y.mean()):
        trainer.optimizer.zero_grad()
        loss(trainer.model(x)).backward()
        trainer.optimizer.step()
    x, target = _batch(64)  # a power of two divides exactly
    trainer.optimizer.zero_grad()
    F.mse_loss(trainer.model(x).to(LOW).float(), target).backward()


def test_a_cast_in_some_batches_only_is_found():
    class Sometimes(nn.Module):
        on = False

        def forward(self, x: Tensor) -> Tensor:
            return x.to(LOW).float() if self.on else x

    between = Sometimes()
    model = nn.Sequential(nn.Linear(4, 4), between, nn.Linear(4, 3))
    trainer = Trainer(model, (4,), BackpropClipping(), dtype=torch.float32)
    trainer.step(*_batch(3))
    between.on = True
    with pytest.raises(PrivacyViolationError, match="A part of the model computes in"):
        trainer.step(*_batch(3))


def test_backward_under_autocast():
    frozen = nn.Linear(4, 4).requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), frozen, nn.Linear(4, 3))
    trainer = Trainer(model, (4,), BackpropClipping(), dtype=torch.float32)
    x, target = _batch(3)
    loss = linear_loss(trainer.model(x), target, "mean")
    with torch.autocast("cpu", LOW), pytest.raises(PrivacyViolationError) as refusal:
        loss.backward()
    assert str(refusal.value) == (
        "backward() was called under autocast, where a mean's gradients would be rounded so "
        "coarsely that one example changes all others. Call it outside of the autocast context, "
        "as torch recommends."
    )
    trainer.step(x, target)


@BUDGETS
def test_a_compiled_backward_under_autocast_is_refused(clipping):
    trainer = _plain(reduction="sum")
    trainer.optimizer.zero_grad()
    trainer.model = torch.compile(trainer.model, backend="aot_eager")
    x, target = _batch(5)
    loss = linear_loss(trainer.model(x), target, "sum")
    with torch.autocast("cpu", LOW), pytest.raises(PrivacyViolationError, match="sums over the"):
        loss.backward()
    trainer.step(x, target)


def test_a_criterions_value_is_no_coarser_than_float32():
    made = []
    for dtype in (torch.float32, LOW):
        torch.manual_seed(0)
        trainer = _plain(criterion=nn.MSELoss())
        x, target = torch.ones(3, 4), torch.full((3, 3), 1.1)
        trainer.optimizer.zero_grad()
        made.append(trainer.loss(trainer.model(x).to(dtype), target.to(dtype), "mean"))
        made[-1].backward()
    assert made[1].dtype == torch.float32
    torch.testing.assert_close(*made, rtol=0.02, atol=0)
