"""One factor for layers of very different sizes: no overflow, underflow or magnified rounding."""

import pytest
import torch
from torch import Tensor, nn

from tests.checks import Trainer, check_independence, check_sensitivity
from tests.joint.helpers import ATTAINED, joint, released
from tests.strategies import BOUNDS, MODES


class Wide(nn.Module):
    """Linear layers side by side, each with an output of its own."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=1)


def _careful(output: Tensor, target: Tensor, reduction: str) -> Tensor:
    """As ``linear_loss``, dividing before anything overflows."""
    return (output * (target / (len(output) if reduction == "mean" else 1))).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_layers_of_very_different_size_share_one_factor(dtype, reduction):
    trainer = Trainer(Wide(3), (1,), joint(), dtype=dtype, reduction=reduction, loss=_careful)
    x = torch.ones(1, 1, dtype=dtype)
    for height in (1e-12, 1.0, 1e15):
        target = height * torch.tensor([[1.0, 1e-5, 1e-10]], dtype=dtype)
        own = target.double().norm()
        expected = target[0].double() * min(1.0, 1 / float(own))
        found = released(trainer, x, target).double()
        assert torch.allclose(found, expected, rtol=1e-4, atol=0), f"{found} at {height}"


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("height", [1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e17])
def test_float32_gradients_of_every_height_are_within_delta(height, normalize):
    clipping = joint(normalize=normalize)
    trainer = Trainer(Wide(7), (1,), clipping, dtype=torch.float32, reduction="sum")
    x = torch.ones(1, 1)
    target = torch.full((1, 7), height)
    norm = released(trainer, x, target).double().norm()
    own = 7**0.5 * height
    wanted = own / (own + 0.01) if normalize else min(1.0, own)
    assert norm <= 1
    assert norm == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("height", [1e20, 1e30, 3e38, float("inf")])
def test_what_overflows_in_one_layer_is_silent_in_all(height, bound, normalize):
    trainer = Trainer(Wide(3), (1,), joint(bound=bound, normalize=normalize), dtype=torch.float32)
    target = torch.tensor([[1.0, 2.0, 3.0]] * 4)
    target[-1, 1] = height
    with_z = released(trainer, torch.ones(4, 1), target).clone()
    # In one order or another: the sums are float32.
    assert (with_z - released(trainer, torch.ones(3, 1), target[:-1])).norm() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.03, 0.99])
def test_hundreds_of_layers_at_the_edge_of_what_is_in_range(dtype, share):
    # Each layer's square is in range, their sum's may not be.
    count = 300
    height = share * torch.finfo(dtype).max ** 0.5 / 16
    trainer = Trainer(Wide(count), (1,), joint(), dtype=dtype, loss=_careful)
    sums = []
    for companions in (0, 1, 9):
        target = torch.zeros(1 + companions, count, dtype=dtype)
        target[0] = height
        sums.append(released(trainer, torch.ones(len(target), 1, dtype=dtype), target).clone())
    assert sums[0].norm() <= 1
    for other in sums[1:]:
        assert (other - sums[0]).norm() < 1e-4


def test_hundreds_of_small_layers_add_up():
    count = 1000
    trainer = Trainer(Wide(count), (1,), joint(), dtype=torch.float32, reduction="sum")
    # Alone each is far below the limit, together they are twice as large.
    target = torch.full((1, count), 2 / count**0.5)
    assert ATTAINED <= released(trainer, torch.ones(1, 1), target).norm() <= 1


def test_hundreds_of_vanishing_layers_are_not_scaled_up():
    trainer = Trainer(Wide(1000), (1,), joint(normalize=True), dtype=torch.float32, reduction="sum")
    norm = released(trainer, torch.ones(1, 1), torch.full((1, 1000), 1e-30)).norm()
    assert norm <= 1e-25


class Cancelling(nn.Module):
    """An example's positions, or a layer's uses, cancel to rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = {
            "positions": lambda: nn.Linear(4, 4),
            "uses": lambda: nn.Linear(4, 4, bias=False),
            "norm": lambda: nn.LayerNorm(4),
            "norms": lambda: nn.LayerNorm(4),
            "conv": lambda: nn.Conv1d(4, 4, 1),
            "slopes": lambda: nn.PReLU(),
            "embedding": lambda: nn.Embedding(3, 4),
        }[kind]()
        self.signs = torch.tensor([1.0, -1.0])

    def forward(self, x: Tensor) -> Tensor:
        # 0.1 is no binary fraction: three tenths less three times a tenth is rounding.
        left, right = 0.1 * x + 0.2 * x, 0.3 * x
        if self.kind in ("uses", "norms", "slopes"):
            return self.layer(left) - self.layer(right)
        if self.kind == "embedding":
            ids = torch.zeros(len(x), 3, dtype=torch.long)
            y = self.layer(ids)
            return 0.1 * x * y[:, 0] + 0.2 * x * y[:, 1] - 0.3 * x * y[:, 2]
        both = torch.stack([left, right], dim=1)
        if self.kind == "conv":
            both = both.transpose(1, 2)
            y = self.layer(both).transpose(1, 2)
        else:
            y = self.layer(both)
        return y[:, 0] - y[:, 1]


KINDS = ("positions", "uses", "norm", "norms", "conv", "slopes", "embedding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("height", [1.0, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_cancel_to_rounding_are_not_scaled_up_to_delta(kind, height, dtype):
    torch.manual_seed(0)
    model = Cancelling(kind)
    if model.layer.__class__ is nn.PReLU:
        nn.init.constant_(model.layer.weight, 0.25)
    trainer = Trainer(model, (4,), joint(normalize=True), dtype=dtype, reduction="sum")
    x = -torch.rand(1, 4, dtype=dtype) - 0.5
    weight = torch.rand(1, 4, dtype=dtype) + 0.5
    found = released(trainer, x, height * weight).double()
    # A tenth of Delta: what rounding alone has made is far from the limit.
    assert found.norm() <= 0.1, f"rounding was scaled up to {found.norm()}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_gradients_that_cancel_stay_within_delta_and_independent(bound, kind):
    torch.manual_seed(0)
    for normalize in (False, True):
        clipping = joint(bound=bound, normalize=normalize)
        trainer = Trainer(Cancelling(kind), (4,), clipping, max_grad_norm=0.5)
        x = torch.randn(5, 4, dtype=torch.float64)
        target = 1e5 * torch.randn(5, 4, dtype=torch.float64)
        check_sensitivity(trainer, x, target)
        check_independence(trainer, x, target)


@pytest.mark.parametrize("limit", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_limits_of_every_size(limit, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(), nn.Linear(3, 2))
    for normalize in (False, True):
        trainer = Trainer(model, (3,), joint(normalize=normalize), max_grad_norm=limit, dtype=dtype)
        x, target = torch.randn(3, 3, dtype=dtype), 1e5 * torch.randn(3, 2, dtype=dtype)
        sums = released(trainer, x, target).double()
        assert sums.isfinite().all()
        assert sums.norm() <= 3 * limit
        if normalize:
            assert sums.any()
        trainer.model.cleanup()


def test_an_examples_zero_gradient_is_zero():
    trainer = Trainer(Wide(3), (1,), joint(normalize=True))
    target = torch.zeros(2, 3, dtype=torch.float64)
    assert not released(trainer, torch.ones(2, 1, dtype=torch.float64), target).any()
