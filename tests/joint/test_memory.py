"""After a backward pass nothing of it is kept in memory, also if it was interrupted."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.clipping.scope import Scope
from opacus_bpclip.clipping.use import Use
from tests.checks import Trainer
from tests.joint.helpers import joint


class Watched(nn.Module):
    """A layer of each path; notes which tensors pass between them, and their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.Linear(4, 4),
                nn.LayerNorm(4),
                nn.PReLU(),
                nn.Linear(4, 4),
                nn.LayerNorm(4),
            ]
        )
        self.order = (0, 1, 2, 3, 0, 4)  # the first one twice
        self.seen: list[weakref.ref[Tensor]] = []
        self.breaks_at = -1

    def forward(self, x: Tensor) -> Tensor:
        for step, index in enumerate(self.order):
            x = torch.sin(self.layers[index](x))
            self.note(x)
            x.register_hook(lambda g, step=step: self.arrived(g, step))
        return x

    def note(self, tensor: Tensor) -> None:
        self.seen.append(weakref.ref(tensor))

    def arrived(self, gradient: Tensor, step: int) -> None:
        self.note(gradient)
        if step == self.breaks_at:
            raise KeyError("stop")


def _alive(kind: type) -> list[object]:
    """Return the objects of a class that the test has made, and that are still there."""
    # By the type itself: isinstance asks the objects, some of which answer by importing a module.
    return [found for found in gc.get_objects() if issubclass(type(found), kind)]


def _left(trainer: Trainer) -> int:
    return sum(ref() is not None for ref in trainer.plain.seen)


@pytest.fixture
def trainer():
    torch.manual_seed(0)
    gc.collect()
    # What is there already is not looked at: a compiler leaves millions of objects.
    gc.freeze()
    made = Trainer(Watched(), (4,), joint())
    # What a step keeps in any case: p.summed_grad.
    made.optimizer.keep_summed_grad = False
    yield made
    gc.unfreeze()


def _empty_torchs_queue() -> None:
    """Run a backward pass: torch forgets what is left of one that broke off in the next one."""
    torch.ones(1, requires_grad=True).sum().backward()


def _check_nothing_left(trainer: Trainer) -> None:
    """Check that a backward pass that broke off is forgotten when its gradients are thrown away."""
    trainer.optimizer.zero_grad()
    _empty_torchs_queue()
    gc.collect()
    assert _left(trainer) == 0
    assert not _alive(Use)
    assert not _alive(Scope)


def _x() -> Tensor:
    return torch.randn(6, 4, dtype=torch.float64)


def test_a_step_keeps_no_activation_and_no_gradient(trainer):
    gc.disable()
    try:
        trainer.step(_x(), _x())
        assert len(trainer.plain.seen) >= 12
        assert _left(trainer) == 0
        assert not _alive(Use)
    finally:
        gc.enable()


def test_nothing_is_kept_while_the_loss_is(trainer):
    gc.disable()
    try:
        trainer.optimizer.zero_grad()
        loss = trainer.loss(trainer.model(_x()), _x(), "mean")
        loss.backward()
        assert not _alive(Use)
        assert _left(trainer) == 0
        del loss
    finally:
        gc.enable()


def test_steps_leave_no_scopes_behind(trainer):
    for _ in range(5):
        trainer.step(_x(), _x())
    gc.collect()
    assert not _alive(Scope)


@pytest.mark.parametrize("step", [0, 2, 4, 5])
def test_a_backward_pass_that_breaks_off_leaves_nothing(trainer, step):
    trainer.plain.breaks_at = step
    trainer.optimizer.zero_grad()
    loss = trainer.loss(trainer.model(_x()), _x(), "mean")
    with pytest.raises(KeyError):
        loss.backward()
    del loss
    _check_nothing_left(trainer)
    trainer.plain.breaks_at = -1
    trainer.step(_x(), _x())


def test_a_refused_backward_pass_leaves_nothing(trainer):
    trainer.optimizer.zero_grad()
    loss = trainer.loss(trainer.model(_x()), _x(), "mean")
    loss = loss + 1e4 * trainer.plain.layers[0].weight.sum()
    with pytest.raises(PrivacyViolationError):
        loss.backward()
    del loss
    _check_nothing_left(trainer)


def test_a_forward_pass_without_a_backward_pass_leaves_nothing(trainer):
    trainer.model(_x())
    gc.collect()
    assert _left(trainer) == 0
    assert not _alive(Scope)


def test_a_forward_pass_that_fails_leaves_nothing(trainer):
    with pytest.raises(RuntimeError):
        trainer.model(torch.zeros(2, 4, 5, dtype=torch.float64))
    gc.collect()
    assert _left(trainer) == 0
    assert not _alive(Scope)


def test_a_deep_models_gradients_are_let_go_as_they_are_added_up():
    # At the end of the backward pass no more is in memory than what the sums need.
    torch.manual_seed(0)
    width, depth, rows = 64, 12, 256
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    trainer = Trainer(nn.Sequential(*layers), (width,), joint())
    x = torch.randn(rows, width, dtype=torch.float64)
    trainer.step(x, x)
    gc.collect()
    assert not [t for t in _alive(Tensor) if t is not x and t.shape == x.shape]
