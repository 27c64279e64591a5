"""Unusual backward passes spend the joint budget once, or are refused."""

import contextlib

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.checks import Trainer
from tests.helpers import mlp
from tests.joint.helpers import (
    joint,
    released,
    summed,
)
from tests.joint.parts import doubles, target_for


class Heads(nn.Module):
    """Two layers on the same input, each with an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def _heads() -> tuple[Trainer, Tensor, Tensor]:
    trainer = Trainer(Heads(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    return trainer, x, trainer.model


def _at_most_delta(trainer: Trainer) -> None:
    """Step, or be refused; what is released is within the sensitivity."""
    try:
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert summed(trainer.plain).norm() <= trainer.optimizer.max_grad_norm


@pytest.mark.parametrize("retain", [False, True])
def test_two_backward_passes_through_parts_of_one_forward_pass_spend_delta_once(retain):
    trainer, x, model = _heads()
    left, right = model(x)
    (1e3 * left.sum()).backward(retain_graph=retain)
    try:
        (1e3 * right.sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_two_backward_passes_spend_delta_once_also_where_batches_may_add_up():
    trainer, x, model = _heads()
    trainer.optimizer._hooks.allow_grad_accumulation()
    left, right = model(x)
    (1e3 * left.sum()).backward()
    try:
        (1e3 * right.sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class Greedy(nn.Module):
    """Trains each block on a loss of its own, inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:-1]:
            y = block(x)
            (1e3 * y.sum()).backward()
            x = y.detach()
        return self.blocks[-1](x)


def test_local_losses_inside_the_forward_pass_spend_delta_once():
    trainer = Trainer(Greedy(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    try:
        (1e3 * trainer.model(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class Energy(nn.Module):
    """Moves its input along a gradient of its own layer, then uses the layer again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((self.layer(z) * 1e-6).sum(), z)
        return self.layer(x + g.detach())


def test_a_gradient_taken_inside_the_forward_pass_does_not_hide_a_use():
    trainer = Trainer(Energy(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    try:
        (1e5 * trainer.model(torch.ones(1, 3, dtype=torch.float64)).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_a_look_at_an_inputs_gradient_releases_nothing():
    trainer, x, model = _heads()
    left, right = model(x)
    torch.autograd.grad(left.sum(), x, retain_graph=True)
    try:
        right.sum().backward()
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert not trainer.plain.left.weight.summed_grad.any()


def test_a_backward_pass_that_broke_off_leaves_nothing_to_the_next():
    trainer, x, model = _heads()
    left, right = model(x)

    def breaks(gradient: Tensor) -> None:
        raise KeyError("stop")

    x.register_hook(breaks)
    with pytest.raises(KeyError):
        left.sum().backward()
    with contextlib.suppress(KeyError, PrivacyViolationError):
        right.sum().backward()
    try:
        trainer.optimizer.step()
    except PrivacyViolationError:
        return
    assert not trainer.plain.left.weight.summed_grad.any()


class Teaching(nn.Module):
    """Calls the whole model again, without gradients, in the middle of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, teacher: bool = False) -> Tensor:
        y = self.first(x)
        if not teacher:
            with torch.no_grad():
                y = y + self(x, teacher=True)
        return self.third(self.second(y))


def test_a_call_of_the_model_inside_itself_does_not_split_the_budget():
    trainer = Trainer(Teaching(), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.ones(1, 3, dtype=torch.float64)
    try:
        (1e5 * trainer.model(x).sum()).backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


class _Steeper(torch.autograd.Function):
    """Makes a gradient larger, in the memory that it came in."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g.mul_(1e6)


class Residual(nn.Module):
    """Both branches get one tensor as their gradient, and one of them may change it in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.small = nn.Linear(3, 3, bias=False)
        self.branch = {
            "linear": lambda: nn.Linear(3, 3),
            "norm": lambda: nn.LayerNorm(3),
            "layer": lambda: nn.Bilinear(3, 3, 3),
        }[how.partition(", ")[2]]()

    def forward(self, x: Tensor) -> Tensor:
        # Its own gradient is negligible, so the bound does not show that it was changed.
        y = self.small(1e-12 * x)
        if self.how.startswith("hook"):
            y.register_hook(lambda g: g.mul_(1e6).sum() and None)
        else:
            y = _Steeper.apply(y)
        return y + (self.branch(x, x) if "layer" in self.how else self.branch(x))


@pytest.mark.parametrize("kind", ["linear", "norm", "layer"])
@pytest.mark.parametrize("how", ["hook", "function"])
def test_a_gradient_changed_in_place_after_it_was_measured_is_bounded_or_refused(how, kind):
    trainer = Trainer(Residual(f"{how}, {kind}"), (3,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    try:
        (trainer.model(x) * x).sum().backward()
    except PrivacyViolationError:
        return
    _at_most_delta(trainer)


def test_the_same_forward_pass_backward_twice_is_refused():
    trainer = Trainer(mlp(), (4,), joint())
    loss = trainer.model(doubles(2, 4)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyViolationError, match="ran twice for one forward pass"):
        loss.backward()


def test_two_forward_passes_before_one_backward_pass_are_refused():
    trainer = Trainer(mlp(), (4,), joint())
    one, other = trainer.model(doubles(2, 4)), trainer.model(doubles(2, 4))
    with pytest.raises(PrivacyViolationError, match="two forward passes of the model"):
        (one.sum() + other.sum()).backward()


def test_a_forward_pass_that_is_never_used_changes_nothing():
    torch.manual_seed(1)
    trainer = Trainer(mlp(), (4,), joint())
    x, target = doubles(3, 4), target_for(3, 3)
    expected = released(trainer, x, target).clone()
    trainer.optimizer.zero_grad()
    output = trainer.model(x)
    trainer.model(2 * x)
    with torch.no_grad():
        trainer.model(3 * x)
    trainer.loss(output, target, "mean").backward()
    trainer.optimizer.step()
    assert torch.equal(summed(trainer.plain), expected)


def test_a_forward_pass_that_fails_does_not_reach_into_the_next():
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.fails = nn.Linear(3, 3), nn.Linear(3, 2), False

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            if self.fails:
                raise KeyError("stop")
            return self.other(y)

    trainer = Trainer(Failing(), (3,), joint())
    x, target = doubles(3, 3), target_for(3, 2)
    expected = released(trainer, x, target).clone()
    trainer.plain.fails = True
    with pytest.raises(KeyError):
        trainer.model(x)
    trainer.plain.fails = False
    assert torch.equal(released(trainer, x, target), expected)
