"""Layers used several times and tied weights are measured together."""

import copy

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, check_independence, check_sensitivity
from tests.joint.flat import KINDS, Repeated, batch_of
from tests.joint.helpers import (
    check_flat,
    released,
)
from tests.layers import ids_of


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_three_times_is_measured_together(kind):
    torch.manual_seed(0)
    model = Repeated(kind).double()
    x, target = batch_of(model, (4,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_of_a_layer_used_three_times_is_a_sum_of_nothing(kind):
    model = Repeated(kind)
    trainer = Trainer(model, (4,), BackpropClipping())
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert not released(trainer, empty, torch.zeros(0, 8, dtype=torch.float64)).any()


class Language(nn.Module):
    """An embedding whose weight is the output head's, which has a bias of its own."""

    def __init__(self, *, padding: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(6, 3, padding_idx=padding)
        self.middle, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.middle(self.tokens(ids_of(x, 6))))))


class Bound(nn.Module):
    """Layers of two kinds that share parameters in ways of their own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        make = {
            "linear": lambda: nn.Linear(4, 4),
            "linear, both": lambda: nn.Linear(4, 4),
            "conv": lambda: nn.Conv1d(1, 1, 3, padding=1),
            "norms": lambda: nn.LayerNorm(4),
            "slopes": lambda: nn.PReLU(),
            "bias alone": lambda: nn.Linear(4, 4),
            "linear and bag": lambda: nn.Linear(4, 4),
        }[kind]
        self.one, self.other = make(), make()
        if kind == "linear and bag":
            self.other = nn.EmbeddingBag(4, 4, mode="sum")
        if kind == "bias alone":
            self.other.bias = self.one.bias
        else:
            self.other.weight = self.one.weight
        if kind == "linear, both":
            self.other.bias = self.one.bias
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            x = x.unsqueeze(1)
            return self.head(self.other(torch.tanh(self.one(x)))[:, 0])
        y = torch.tanh(self.one(x))
        return self.head(y + self.other(ids_of(x, 4) if self.kind == "linear and bag" else y))


BOUND = ("linear", "linear, both", "conv", "norms", "slopes", "bias alone", "linear and bag")


@pytest.mark.parametrize("kind", BOUND)
def test_tied_parameters_are_measured_together(kind):
    torch.manual_seed(0)
    model = Bound(kind).double()
    x, target = batch_of(model, (4,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target)


@pytest.mark.parametrize("kind", BOUND)
def test_an_empty_batch_of_tied_parameters_is_a_sum_of_nothing(kind):
    trainer = Trainer(Bound(kind), (4,), BackpropClipping())
    empty = torch.zeros(0, 4, dtype=torch.float64)
    assert not released(trainer, empty, torch.zeros(0, 2, dtype=torch.float64)).any()


@pytest.mark.parametrize("padding", [None, 1])
def test_an_embedding_tied_to_the_head_is_measured_with_it(padding):
    torch.manual_seed(0)
    model = Language(padding=padding).double()
    x, target = batch_of(model, (5,), torch.float64)
    check_flat(lambda: copy.deepcopy(model), 9 * x, target)


SHARED = {
    **{f"repeated {kind}": lambda kind=kind: Repeated(kind) for kind in KINDS},
    **{f"tied {kind}": lambda kind=kind: Bound(kind) for kind in BOUND},
    "tied embedding and head": Language,
}


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, 1e6])
@pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
def test_uses_are_measured_alike_at_every_scale(make, scale):
    """What is measured grows as the gradient does: behind a mean, both are divided by n."""
    torch.manual_seed(0)
    model = make()
    x, target = batch_of(model, (5,) if isinstance(model, Language) else (4,), torch.float32)
    # A crowd that is equal, and one more example of the same kind that is small.
    x, target = x[:1].repeat(8, *[1] * (x.dim() - 1)), target[:1].repeat(8, 1)
    target[:-1] *= scale
    trainer = Trainer(model, x.shape[1:], BackpropClipping(), max_grad_norm=0.7, dtype=x.dtype)
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)
