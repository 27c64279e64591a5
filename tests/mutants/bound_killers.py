"""Killers of mutants of bounds and limits: one example against none, where the bound is reached."""

from __future__ import annotations

import numpy as np
import torch
from opacus.layers import DPRNN
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip.config import Propagate
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.budgets import layerwise
from tests.checks import HUGE, Trainer, check_sensitivity
from tests.helpers import make_private, summed


def _one(model: nn.Module, shape: tuple[int, ...], x: Tensor, target: Tensor, **options) -> None:
    """Check the sensitivity on one example against none."""
    trainer = Trainer(model, shape, layerwise(**{"max_input_norm": 1.0} | options))
    x = x if x.dtype == torch.long else x.double()
    check_sensitivity(trainer, x[None], target.flatten()[None].double())


def _spike(*shape: int, at: tuple[int, ...]) -> Tensor:
    x = torch.zeros(shape)
    x[at] = HUGE
    return x


def below_the_clip() -> None:
    """64 examples just below the clip, and one that opposes them."""
    _below("clipped")


def below_the_clip_of_one_layer() -> None:
    """The same, where a layer passes its gradient on unclipped."""
    _below("unclipped")


def _below(propagate: Propagate) -> None:
    model = nn.Linear(1, 1, bias=False)
    trainer = Trainer(model, (1,), layerwise(max_input_norm=1.0, propagate=propagate))
    x = torch.ones(65, 1, dtype=torch.float64)
    target = torch.full((65, 1), 0.999, dtype=torch.float64)
    target[-1] = -1e6
    check_sensitivity(trainer, x, target)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


def two_layers_at_their_limits() -> None:
    """One example that reaches the limit of both layers."""
    _one(Branches(), (1,), torch.full((1,), HUGE), torch.full((2,), HUGE))


def two_layers_after_a_new_limit() -> None:
    """The same after `max_grad_norm` was set to a tenth, as clip schedulers do."""
    trainer = Trainer(Branches(), (1,), layerwise())
    trainer.optimizer.max_grad_norm = 0.1
    x, target = torch.full((1, 1), HUGE).double(), torch.full((1, 2), HUGE).double()
    check_sensitivity(trainer, x, target)


def product_with_bias() -> None:
    """A layer of weight 1 with a bias, in the product bound."""
    _one(nn.Linear(1, 1), (1,), torch.full((1,), HUGE), torch.full((1,), HUGE), bound="product")


def weighted_with_bias() -> None:
    """A layer of weight 1 with a bias, in the weighted bound."""
    _one(nn.Linear(1, 1), (1,), torch.full((1,), HUGE), torch.full((1,), HUGE))


def exact_with_bias() -> None:
    """A layer over two positions with a bias, in the exact bound."""
    x, target = torch.full((2, 1), HUGE), torch.full((2,), HUGE)
    _one(nn.Linear(1, 1), (2, 1), x, target, bound="exact")


def own_gradients_with_bias() -> None:
    """A layer over so many positions, in the exact bound, that gradients are cheaper than pairs."""
    x, target = torch.full((5, 1), HUGE), torch.full((5,), HUGE)
    _one(nn.Linear(1, 1), (5, 1), x, target, bound="exact")


def long_sequence() -> None:
    """A layer over nine positions that agree."""
    _one(nn.Linear(1, 1, bias=False), (9, 1), torch.full((9, 1), HUGE), torch.full((9,), HUGE))


def input_above_the_clip() -> None:
    """An input far above `max_input_norm`, in the product bound."""
    model = nn.Linear(2, 1, bias=False)
    _one(model, (2,), torch.full((2,), HUGE), torch.full((1,), HUGE), bound="product")


def reflected_pixel() -> None:
    """A bright pixel that reflection puts into one patch twice."""
    layer = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)
    _one(layer, (1, 4), _spike(1, 4, at=(0, 1)), _spike(1, 4, at=(0, 0)))


def second_group() -> None:
    """A grouped convolution whose second group alone has an input."""
    layer = nn.Conv1d(2, 2, 1, groups=2, bias=False)
    _one(layer, (2, 3), _spike(2, 3, at=(1, 1)), _spike(2, 3, at=(1, 1)))


def two_groups() -> None:
    """A grouped convolution whose groups have the same input."""
    layer = nn.Conv1d(2, 2, 1, groups=2, bias=False)
    _one(layer, (2, 1), torch.full((2, 1), HUGE), torch.full((2,), HUGE))


def repeated_token_by_product() -> None:
    """One token at nine positions, in the product bound."""
    ids = torch.zeros(9, dtype=torch.long)
    _one(nn.Embedding(2, 1), (9,), ids, torch.ones(9), bound="product")


def repeated_token_by_exact() -> None:
    """One token at nine positions, in the exact bound."""
    ids = torch.zeros(9, dtype=torch.long)
    _one(nn.Embedding(2, 1), (9,), ids, torch.ones(9), bound="exact")


def normalised_spike() -> None:
    """A layer normalisation over one spike, whose normalised value is large."""
    x, target = _spike(64, at=(3,)), _spike(64, at=(3,))
    _one(nn.LayerNorm(64), (64,), x, target)


def layer_norm_far_from_zero() -> None:
    """A layer normalisation of values whose mean is far above their deviations, in float32."""
    layer = nn.LayerNorm(8, eps=1e-12)
    trainer = Trainer(layer, (3, 8), layerwise(), dtype=torch.float32)
    x = 1e8 + torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    check_sensitivity(trainer, x, torch.ones(2, 24))


class Sides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(-x)


def two_uses() -> None:
    """A layer used twice, both uses pulling the same way."""
    uses = {"layer": 2}
    _one(Sides(), (1,), torch.full((1,), HUGE), torch.full((1,), HUGE), uses=uses)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(-x)


def tied_layers() -> None:
    """Two layers with one weight, both pulling it the same way."""
    _one(Tied(), (1,), torch.full((1,), HUGE), torch.full((1,), HUGE))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPRNN(1, 1, bias=False, batch_first=True, nonlinearity="relu")
        for p in self.rnn.parameters():
            nn.init.ones_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def steps_that_agree() -> None:
    """A recurrent network whose time steps all pull the same way."""
    _one(Reader(), (5, 1), torch.ones(5, 1), torch.full((1,), HUGE))


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


class ShiftedRule(BroadcastRule):
    parameters = ("shift", "scale")
    dims = {"shift": 2, "scale": 2}  # noqa: RUF012


def two_raw_parameters() -> None:
    """A module with a shift and a scale, which one example moves both."""
    before = RULES.setdefault(Shifted, ShiftedRule)
    try:
        _one(Shifted(), (3,), torch.ones(3), torch.full((3,), HUGE))
    finally:
        if before is ShiftedRule:
            RULES.pop(Shifted)


def vanishing_columns() -> None:
    """Inputs whose squares vanish in float32, and a large upstream gradient."""
    model = nn.Linear(2, 2, bias=False)
    trainer = Trainer(model, (2,), layerwise(), max_grad_norm=1e-9, dtype=torch.float32)
    check_sensitivity(trainer, torch.full((1, 2), 1e-24), torch.full((1, 2), 1e17))


def buffer_filled_anew() -> None:
    """A layer on one tensor, whose memory is filled with another batch between two steps."""
    memory = np.full((1, 1), 1e-3)
    x = torch.from_numpy(memory)
    model = nn.Linear(1, 1, bias=False).double()
    private = make_private(
        model,
        data=TensorDataset(torch.zeros(32, 1).double()),
        backprop=layerwise(max_input_norm=None, probe=False),
    )
    for value in (1e-3, HUGE):
        memory[:] = value
        private.optimizer.zero_grad()
        (HUGE * private.model(x)).sum().backward()
        private.optimizer.step()
        moved = float(summed(private).norm())
        assert moved <= 1.0, f"(root): {moved} > 1.0"
