"""Killers of mutants of whitening."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipHooks, BackpropClipping, InputWhitening
from tests.checks import HUGE, Trainer, check_independence, check_sensitivity, joint


def _trainer(model: nn.Module, public: Tensor, allocation: str = "joint") -> Trainer:
    """Return a trainer whose matrices are learnt from the given public inputs."""
    whitening = InputWhitening(lambda _: public, power=0.5)
    clipping = BackpropClipping(allocation=allocation, whitening=whitening)  # type: ignore[arg-type]
    return Trainer(model, tuple(public.shape[1:]), clipping, reduction="sum")


def _public(*shape: int) -> Tensor:
    """Return inputs that are small everywhere but in the first entry."""
    x = torch.full((4, *shape), 1e-3)
    x[..., 0] = 1.0
    return x


def _check_ones(trainer: Trainer, *shape: int, outputs: int) -> None:
    check_sensitivity(
        trainer, torch.ones(2, *shape).double(), HUGE * torch.ones(2, outputs).double()
    )


def private_inputs_far_from_the_public_ones() -> None:
    """Four examples that are random, beside public ones that are large in one direction."""
    torch.manual_seed(0)
    trainer = _trainer(nn.Linear(4, 2), _public(4))
    check_independence(trainer, torch.randn(4, 4).double(), torch.randn(4, 2).double())


def a_small_direction_at_one_position() -> None:
    """An example that is large where the public ones are small, at a layer of one position."""
    torch.manual_seed(0)
    _check_ones(_trainer(nn.Linear(4, 2), _public(4)), 4, outputs=2)


def a_large_direction_at_many_positions() -> None:
    """An example that is large where the public ones are, at three positions of a layer with many
    outputs, measured by products."""
    torch.manual_seed(0)
    trainer = _trainer(nn.Linear(8, 64, bias=False), _public(3, 8))
    x = torch.zeros(2, 3, 8).double()
    x[..., 0] = 1.0
    check_sensitivity(trainer, x, HUGE * torch.ones(2, 192).double())


def a_small_direction_by_itself() -> None:
    """The same at many positions of a small layer that has a budget of its own."""
    torch.manual_seed(0)
    _check_ones(_trainer(nn.Linear(4, 2), _public(50, 4), "equal"), 50, 4, outputs=100)


def a_gradient_of_two_groups() -> None:
    """A convolution of two groups: the first one's public inputs are large in the direction of the
    example, the second one's in another."""
    torch.manual_seed(0)
    public = torch.full((4, 32, 4), 1e-3)
    public[:, :17] = 1.0
    trainer = _trainer(nn.Conv1d(32, 64, 3, groups=2, bias=False), public)
    target = torch.zeros(2, 64, 2).double()
    target[:, :32] = HUGE
    check_sensitivity(trainer, torch.ones(2, 32, 4).double(), target.flatten(1))


def a_large_direction_reaches_the_limit() -> None:
    """An example in the direction in which the public ones are large reaches the limit."""
    torch.manual_seed(0)
    trainer = _trainer(nn.Linear(4, 2, bias=False), _public(4))
    x = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).double()
    reached = joint(trainer.released(x, HUGE * torch.ones(1, 2).double())).norm()
    assert reached > 0.999, f"a large example reaches only {reached} of the limit"


def a_mean_in_single_precision() -> None:
    """Whitening behind a plain mean in float32 is refused."""
    clipping = BackpropClipping(whitening=InputWhitening(lambda _: torch.ones(3, 4)))
    try:
        Trainer(nn.Linear(4, 2), (4,), clipping, dtype=torch.float32)
    except ValueError:
        return
    raise AssertionError("a plain mean was accepted")


def random_public_examples() -> None:
    """Public examples that are drawn, and seeded, leave the global generator as it was."""

    def probes(step: int) -> Tensor:
        torch.manual_seed(step)
        return torch.randn(3, 4)

    model = nn.Linear(4, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    clipping = BackpropClipping(whitening=InputWhitening(probes))
    BackpropClipHooks(model, config=clipping, loss_reduction="sum")
    moved = not torch.equal(torch.get_rng_state(), state)
    assert not moved, "the public examples have moved the noise's generator"


class _Measuring(nn.Module):
    """Keeps a scale of the batch in training, and reads it in evaluation mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(3).double(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x * self.scale * self.last
        with torch.no_grad():
            self.scale = self.last = x.abs().mean(0)
        return x.tanh()


def state_that_evaluation_reads() -> None:
    """A step on small examples or on large ones, and matrices that are learnt after it."""
    found = []
    for size in (1, 1000):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), _Measuring(), nn.Linear(3, 3))
        model[1].last = torch.ones(3).double()
        trainer = _trainer(model, torch.randn(9, 4))
        trainer.optimizer.param_groups[0]["lr"] = 0.0
        trainer.step(size * torch.ones(2, 4).double(), torch.zeros(2, 3).double())
        scale = model[1].scale.clone()
        learning = trainer.optimizer._hooks._whitening
        learning.stale = True
        learning.follow()
        assert torch.equal(model[1].scale, scale), "learning has left a trace"
        matrix = learning.layers["2"].matrix
        found.append(matrix.times(torch.eye(3, dtype=matrix.scale.dtype)[None]))
    assert torch.equal(*found), "an example of the step reached the matrices"
