"""Layers used several times in one forward pass, as often as declared, and tied weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import CoverageError, PrivacyViolationError
from tests.budgets import layerwise
from tests.checks import Trainer, check_independence, check_sensitivity, joint, squared_loss
from tests.strategies import BOUNDS, MODES, hostile_batches, scales, seeds


class Recurrent(nn.Module):
    """Applies one layer ``steps`` times."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            x = torch.tanh(self.cell(x))
        return self.head(x)


class Sides(nn.Module):
    """Applies one layer to the input and to its negative: both uses can pull the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) - self.layer(-x)


def _trainer(model, uses, **options):
    clipping = layerwise(uses=uses, **options)
    return Trainer(model, (3,), clipping, max_grad_norm=0.9)


@st.composite
def recurrences(draw):
    torch.manual_seed(draw(seeds))
    steps = draw(st.integers(1, 4))
    bound, normalize = draw(st.sampled_from(MODES))
    trainer = _trainer(Recurrent(steps), {"cell": steps}, bound=bound, normalize=normalize)
    x = draw(hostile_batches((3,), min_size=1))
    rows = torch.tensor([draw(scales) for _ in x], dtype=torch.float64)
    return trainer, x, torch.randn(len(x), 2, dtype=torch.float64) * rows[:, None]


@given(recurrences())
def test_all_uses_together_stay_within_the_layers_sensitivity(case):
    check_sensitivity(*case)
    check_independence(*case)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_uses_that_agree_reach_the_layers_sensitivity(bound, normalize):
    trainer = _trainer(Sides(), {"layer": 2}, bound=bound, normalize=normalize)
    x = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64)
    target = torch.tensor([[1e4, 0.0]], dtype=torch.float64)
    assert 0.999 * 0.9 <= joint(trainer.released(x, target)).norm() <= 0.9


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_without_clipping_the_uses_add_up_as_in_autograd(steps):
    torch.manual_seed(0)
    model = Recurrent(steps).double()
    x, target = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    squared_loss(model(x), target, "sum").backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    clipping = layerwise(bound="exact", max_input_norm=None, uses={"cell": steps})
    trainer = Trainer(model, (3,), clipping, max_grad_norm=1e12, loss=squared_loss)
    assert torch.allclose(joint(trainer.released(x, target)), expected)


@pytest.mark.parametrize("bound", BOUNDS)
def test_more_uses_than_declared_are_refused_on_the_batch(bound):
    trainer = _trainer(Recurrent(3), {"cell": 2}, bound=bound)
    with pytest.raises(PrivacyViolationError, match=r"^cell is used more than 2 times"):
        trainer.released(torch.ones(2, 3).double(), torch.ones(2, 2).double())


def test_fewer_uses_than_declared_are_fine():
    trainer = _trainer(Recurrent(2), {"cell": 3})
    check_sensitivity(trainer, torch.ones(2, 3).double() * 50, torch.ones(2, 2).double() * 50)


def test_an_unclipped_gradient_beside_several_uses_is_found():
    trainer = _trainer(Recurrent(2), {"cell": 2})
    output = trainer.model(torch.ones(2, 3).double())
    with pytest.raises(PrivacyViolationError, match="gradient from outside its layer's call"):
        (output.mean() + trainer.plain.cell.weight.square().sum()).backward()


def test_two_forward_passes_in_one_loss_are_refused_where_one_use_is_declared():
    trainer = _trainer(Recurrent(1), {})
    x = torch.ones(2, 3).double()
    with pytest.raises(PrivacyViolationError, match="came from two forward passes of the model"):
        (trainer.model(x) + trainer.model(2 * x)).mean().backward()


def test_the_limit_of_each_use_follows_max_grad_norm():
    trainer = _trainer(Sides(), {"layer": 2})
    trainer.optimizer.max_grad_norm = 0.3
    x = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64)
    reached = joint(trainer.released(x, torch.tensor([[1e4, 0.0]]).double())).norm()
    assert 0.999 * 0.3 <= reached <= 0.3


def test_uses_of_a_layer_that_does_not_exist_are_refused_before_training():
    with pytest.raises(
        CoverageError, match="uses names layers that the model does not train: body"
    ):
        _trainer(Recurrent(1), {"body": 2})


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2", None], ids=repr)
def test_uses_are_whole_numbers_from_one(count):
    with pytest.raises(ValueError, match=r"Expected uses\['cell'\]=.* an integer >= 1\.$"):
        layerwise(uses={"cell": count})


def test_uses_are_a_mapping():
    with pytest.raises(ValueError, match="to be a mapping of names to counts"):
        layerwise(uses=2)


class Tied(nn.Module):
    """An embedding and an output head with one weight, and a layer of its own between."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle = nn.Embedding(6, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 6)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.tokens(ids))).mean(1))


class TiedSides(nn.Module):
    """Two layers with one weight that pull it the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) - self.right(-x)


@given(seeds, st.sampled_from(MODES), st.lists(scales, min_size=1, max_size=4))
def test_tied_weights_train_within_their_sensitivity(seed, mode, rows):
    torch.manual_seed(seed)
    bound, normalize = mode
    clipping = layerwise(bound=bound, normalize=normalize)
    trainer = Trainer(Tied(), (4,), clipping, max_grad_norm=0.9)
    assert set(trainer.optimizer.layer_sensitivities) == {"tokens", "middle"}
    ids = torch.randint(6, (len(rows), 4))
    target = torch.randn(len(rows), 6, dtype=torch.float64) * torch.tensor(rows)[:, None]
    with_z = joint(trainer.released(ids, target))
    without_z = joint(trainer.released(ids[:-1], target[:-1]))
    assert (with_z - without_z).norm() <= 0.9 * (1 + 1e-9 * len(rows))
    check_independence(trainer, ids, target)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_tied_layers_that_agree_reach_their_common_sensitivity(bound, normalize):
    trainer = _trainer(TiedSides(), {}, bound=bound, normalize=normalize)
    x = torch.tensor([[1e4, 0.0, 0.0]], dtype=torch.float64)
    reached = joint(trainer.released(x, torch.tensor([[1e4, 0.0]]).double())).norm()
    assert 0.999 * 0.9 <= reached <= 0.9


def test_without_clipping_tied_weights_add_up_as_in_autograd():
    torch.manual_seed(0)
    model = Tied().double()
    ids, target = torch.randint(6, (5, 4)), torch.randn(5, 6).double()
    squared_loss(model(ids), target, "sum").backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(model, (4,), clipping, max_grad_norm=1e12, loss=squared_loss)
    trainer.step(ids, target)
    summed = torch.cat([p.summed_grad.flatten() for p in model.parameters()])
    assert torch.allclose(summed, expected)


def test_a_shared_parameter_counts_once_in_the_allocation():
    trainer = Trainer(Tied(), (4,), layerwise(), max_grad_norm=1.0)
    sensitivities = trainer.optimizer.layer_sensitivities
    # 18 shared entries and the head's bias of 6, against 9 + 3: squares in proportion of roots.
    ratio = (sensitivities["tokens"] / sensitivities["middle"]) ** 2
    assert ratio == pytest.approx((24 / 12) ** 0.5)


def test_a_tied_weight_used_outside_its_layers_is_found():
    trainer = Trainer(Tied(), (4,), layerwise())
    output = trainer.model(torch.randint(6, (2, 4)))
    with pytest.raises(PrivacyViolationError, match="gradient from outside its layer's call"):
        (output.mean() + trainer.plain.head.weight.square().sum()).backward()


class Heads(nn.Module):
    """Uses one of two layers, so that two batches can meet in different parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, right: bool) -> Tensor:
        return (self.right if right else self.left)(x)


def test_two_batches_that_meet_in_different_layers_are_refused_in_one_poisson_step():
    trainer = _trainer(Heads(), {})
    x = torch.ones(2, 3).double()
    trainer.model(x, False).mean().backward()
    with pytest.raises(PrivacyViolationError, match="not compatible with grad accumulation"):
        trainer.model(2 * x, True).mean().backward()


def test_two_batches_do_not_pass_for_two_uses_of_one():
    trainer = _trainer(Sides(), {"layer": 4})
    x = torch.ones(2, 3).double()
    with pytest.raises(PrivacyViolationError, match="came from two forward passes of the model"):
        (trainer.model(x) + trainer.model(2 * x)).mean().backward()
