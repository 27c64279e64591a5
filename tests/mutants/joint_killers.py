"""Killers of mutants of the joint budget: examples whose gradient is in several layers."""

from __future__ import annotations

import torch
from opacus.layers import DPRNN
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from opacus_bpclip import BackpropClipping
from tests.checks import (
    HUGE,
    Trainer,
    check_independence,
    check_refused,
    check_sensitivity,
    check_silent,
)
from tests.companions import Criterion
from tests.mutants.bound_killers import Branches, Sides, Tied


def _one(model: nn.Module) -> None:
    """Check the sensitivity on one example against none."""
    trainer = Trainer(model, (1,), BackpropClipping())
    x = torch.full((1, 1), HUGE).double()
    check_sensitivity(trainer, x, torch.full_like(model(x), HUGE))


def two_layers_in_one_budget() -> None:
    """One example whose gradient is far above the limit in two layers."""
    _one(Branches().double())


def two_uses_in_one_budget() -> None:
    """A layer used twice, both uses pulling the same way."""
    _one(Sides().double())


def tied_layers_in_one_budget() -> None:
    """Two layers with one weight, both pulling it the same way."""
    _one(Tied().double())


def small_gradients_normalised() -> None:
    """One example whose gradient is below the limit, scaled up."""
    trainer = Trainer(Branches(), (1,), BackpropClipping(normalize=True))
    check_sensitivity(trainer, torch.ones(1, 1).double(), torch.full((1, 2), 0.1).double())


def small_batch_before_a_large_one() -> None:
    """A batch of small gradients, and after it one far above the limit."""
    trainer = Trainer(Branches(), (1,), BackpropClipping())
    trainer.step(torch.ones(1, 1).double(), torch.full((1, 2), 0.1).double())
    check_sensitivity(trainer, torch.full((1, 1), HUGE).double(), torch.ones(1, 2).double())


def large_and_small_together_and_alone() -> None:
    """A batch through two layers, with one large example, and its examples one by one."""
    trainer = Trainer(Branches(), (1,), BackpropClipping())
    x, target = torch.ones(4, 1).double(), torch.full((4, 2), 0.1).double()
    target[-1] *= HUGE
    check_independence(trainer, x, target)


class _Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x.long()))


def large_gradients_of_a_tied_embedding() -> None:
    """Six equal sequences through an embedding that is tied to the head, and each alone."""
    torch.manual_seed(0)
    trainer = Trainer(_Language(), (5,), BackpropClipping(), dtype=torch.float32)
    target = torch.zeros(6, 5, 20)
    target[:, 3, 8] = 1e6
    x = torch.tensor([4.0, 19.0, 13.0, 0.0, 3.0]).repeat(6, 1)
    check_independence(trainer, x, target.flatten(1))


class _Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x[:, :1]), self.right(x[:, 1:])], dim=1)


def one_layer_not_finite() -> None:
    """An example with nan in the input of one layer, and not in that of the other."""
    trainer = Trainer(_Parts(), (2,), BackpropClipping())
    x = torch.ones(3, 2, dtype=torch.float64)
    x[-1, 0] = float("nan")
    check_silent(trainer, x, torch.ones(3, 2, dtype=torch.float64))


def rounding_normalised() -> None:
    """A loss whose gradient cancels, with a mean over the batch, scaled up, in float32; and its
    examples one by one."""
    torch.manual_seed(0)
    trainer = Trainer(
        nn.Linear(3, 7),
        (3,),
        BackpropClipping(normalize=True),
        loss=Criterion("differences", scale=1e-6).plain,
        dtype=torch.float32,
    )
    check_independence(trainer, torch.randn(5, 3), torch.zeros(5, 1))


class _Reader(nn.Module):
    """A recurrent network of sequences whose first number is their length, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPRNN(1, 2, batch_first=True)
        self.beside = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x[:, 0].long()
        steps = pack_padded_sequence(
            x[:, 1:, None], lengths, batch_first=True, enforce_sorted=False
        )
        _, last = self.rnn(steps)
        return torch.cat([last[0], self.beside(x)], dim=1)


def sequences_of_several_lengths() -> None:
    """Packed sequences, the shortest first, beside another layer, and each of them by itself."""
    torch.manual_seed(0)
    # Opacus's recurrent layers give the last state of a packed sequence in float32, so that a mean
    # would be rounded there.
    trainer = Trainer(_Reader(), (4,), BackpropClipping(), reduction="sum")
    x = torch.randn(3, 4).double()
    x[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    target = torch.tensor([[0.1], [10.0], [HUGE]]).double() * torch.randn(3, 4).double()
    check_independence(trainer, x, target)


def _multiply(gradient: Tensor) -> None:
    gradient.mul_(HUGE)


def gradient_changed_after_it_was_measured() -> None:
    """A hook that multiplies a layer's upstream gradient in place, after the layer's node."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    trainer = Trainer(model, (2,), BackpropClipping())

    def loss(y: Tensor, _: nn.Module) -> Tensor:
        assert y.grad_fn is not None
        y.grad_fn.register_hook(lambda _, upstream: _multiply(upstream[0]))
        return (2 * y).sum()

    check_refused(trainer, torch.ones(3, 2).double(), loss)


def two_compiled_forward_passes() -> None:
    """Two forward passes of a compiled model on the same examples, joined in one loss."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(2, 2)), (2,), BackpropClipping())
    x = torch.ones(1, 2).double()
    trainer.step(x, x)
    call = torch.compile(trainer.model, backend="aot_eager")
    check_refused(trainer, x, lambda *_: HUGE * (call(x) + call(2 * x)).sum())
    torch._dynamo.reset()
