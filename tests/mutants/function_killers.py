"""Killers of mutants of the functions on parameters: models in which each call matters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, check_refused, check_sensitivity
from tests.functions.parts import Stack, Twice
from tests.joint.flat import batch_of
from tests.joint.helpers import check_flat
from tests.probing import made_up

# As many steps as examples: a wrong axis has the right size.
_SQUARE = (4, 4)


def _flat(model: nn.Module, shape: tuple[int, ...] = (3, 4)) -> None:
    model = model.double()
    x, target = batch_of(model, shape, torch.float64)
    check_flat(lambda: copy.deepcopy(model), x, target, limits=(1.0,))


class _SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.transpose(0, 1) * self.scale).transpose(0, 1).flatten(1)


def batch_on_the_second_axis() -> None:
    """A scale of sequences that have the batch on the second axis, as many steps as examples."""
    _flat(_SequenceFirst(), _SQUARE)


def rows_folded_with_other_axes() -> None:
    """A part in which all examples' first halves come before all second halves."""
    torch.manual_seed(0)
    _flat(Stack(["strided"]))


class _Returning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.derived = 2 * self.scale
        return x * self.scale


def derived_tensor_in_the_loss() -> None:
    """A penalty on a tensor that the model computes from a parameter, and keeps."""
    model = _Returning()
    trainer = Trainer(model, (3,), BackpropClipping(), probe=True)
    check_refused(
        trainer, torch.ones(2, 3).double(), lambda y, _: y.sum() + model.derived.square().sum()
    )


def scale_of_every_example() -> None:
    """A root mean square normalisation by hand, on examples of several sizes."""
    torch.manual_seed(0)
    _flat(Stack(["root mean square"]))


class _Shared(nn.Module):
    """A linear layer by a function, on sequences that have the batch on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1))
        self.bias = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def linear_function_with_bias() -> None:
    """A linear function whose bias gets most of the gradient."""
    trainer = Trainer(_Shared(), (1,), BackpropClipping())
    check_sensitivity(trainer, torch.full((1, 1), 1e-3).double(), torch.ones(1, 2).double() * 10)


def parameter_used_by_two_functions() -> None:
    """A root mean square normalisation that is used twice, both uses pulling the same way."""
    torch.manual_seed(0)
    _flat(Twice("root mean square"))


def weight_computed_from_parameters() -> None:
    """A convolution whose weight is standardised first."""
    torch.manual_seed(0)
    _flat(Stack(["standardised"]))


class _Turned(nn.Module):
    """Turns the examples' order round, scales them, and turns it back."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flip(0) * self.scale).flip(0)


class _Copies(nn.Module):
    """Adds copies of a token that are in another order than the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.token.expand(len(x), -1).flip(0)


def _refused(model: nn.Module) -> None:
    from opacus_bpclip.model.coverage import trainable_layers
    from opacus_bpclip.probe import try_model

    batch = made_up(torch.zeros(4, 4))
    layers = trainable_layers(model)
    problem, _ = try_model(model, batch, loss_reduction="mean", layers=layers, ordered=True)
    assert problem is not None, "rows in another order were not found"


def rows_turned_round() -> None:
    """A model that turns its rows round, scales them, and turns them back."""
    _refused(_Turned())


def copies_turned_round() -> None:
    """A model that turns copies of a token round, and only then multiplies the examples."""
    _refused(_Copies())
