"""Copies, settings, precisions and hooks: everyday training with the joint budget."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import BackpropClipping, PrivacyViolationError
from tests.checks import Trainer, check_independence, check_sensitivity
from tests.helpers import make_private, mlp, train_step, values
from tests.joint.helpers import (
    ATTAINED,
    clipped_flat,
    joint,
    own_gradients,
    released,
    summed,
)
from tests.joint.parts import doubles, target_for

# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_private_model_clips_with_a_factor_of_its_own(how):
    trainer = Trainer(mlp(), (4,), joint(), max_grad_norm=0.5, reduction="sum")
    x, target = doubles(4, 4), target_for(4, 3)
    expected = released(trainer, x, target).clone()
    trainer.optimizer.zero_grad()
    output = trainer.model(x)  # in the middle of training
    if how == "deepcopy":
        twin = copy.deepcopy(trainer.model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(trainer.model))
    else:
        buffer = io.BytesIO()
        torch.save(trainer.model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert twin._budget is not trainer.model._budget
    assert twin._budget.key != trainer.model._budget.key
    trainer.optimizer.max_grad_norm = 7.0
    assert twin._max_grad_norm == 0.5
    assert twin._budget.target.norms.tolist() == [0.5, 0.5]
    twin._guard.clear()
    twin.zero_grad()
    trainer.loss(twin(x), target, "sum").backward()
    sums = [twin._guard.take(p) for p in twin._module.parameters()]
    assert (torch.cat([s.flatten() for s in sums]) - expected).norm() < 1e-12
    # The original goes on from where it was.
    trainer.loss(output, target, "sum").backward()
    assert trainer.optimizer._guard.collected == 1


# Settings between steps


def test_delta_can_be_set_between_steps():
    trainer = Trainer(mlp(), (4,), joint(normalize=True), reduction="sum")
    x, target = doubles(1, 4), 1e6 * doubles(1, 3)
    for limit in (0.3, 20.0, 1e-5):
        trainer.optimizer.max_grad_norm = limit
        assert ATTAINED * limit <= released(trainer, x, target).norm() <= limit


def test_delta_cannot_be_set_between_backward_and_step():
    trainer = Trainer(mlp(), (4,), joint())
    trainer.model(doubles(2, 4)).sum().backward()
    with pytest.raises(PrivacyViolationError, match="in the middle of a logical batch"):
        trainer.optimizer.max_grad_norm = 2.0


def test_delta_set_between_forward_and_backward_is_the_one_that_counts():
    trainer = Trainer(mlp(), (4,), joint(), reduction="sum")
    trainer.optimizer.zero_grad()
    output = trainer.model(doubles(1, 4))
    trainer.optimizer.max_grad_norm = 0.01
    (1e6 * output.sum()).backward()
    trainer.optimizer.step()
    assert summed(trainer.plain).norm() <= 0.01


@pytest.mark.parametrize("clear", ["optimizer", "to zero", "model", "by hand", "not at all"])
def test_gradients_cleared_in_any_way_are_cleared(clear):
    private = make_private(mlp(), backprop=joint(), lr=0.0)
    train_step(private)
    expected = torch.cat([p.summed_grad.flatten() for p in private.parameters]).clone()
    if clear == "optimizer":
        private.optimizer.zero_grad()
    elif clear == "to zero":
        private.optimizer.zero_grad(set_to_none=False)
    elif clear == "model":
        private.model.zero_grad()
    elif clear == "by hand":
        for p in private.parameters:
            p.grad = None
    before = values(private).clone()
    try:
        train_step(private)
    except ValueError:
        assert clear == "not at all"
        return
    sums = torch.cat([p.summed_grad.flatten() for p in private.parameters])
    assert torch.equal(sums, expected)
    assert torch.equal(values(private), before)


# Precisions, hooks


class Mixed(nn.Module):
    """Layers of two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.double_ = nn.Linear(4, 4), nn.Linear(4, 4).double()
        self.norm, self.head = nn.LayerNorm(4).double(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.single(x)).double()
        return self.head(self.norm(self.double_(y)).float())


def test_layers_of_two_precisions_share_one_factor():
    model = Mixed()
    x, target = torch.randn(4, 4), torch.randn(4, 2) * torch.tensor([0.01, 1.0, 1e2, 1e5])[:, None]
    own = [g.double() for g in own_gradients(model, x, target)]
    private = make_private(copy.deepcopy(model), backprop=joint(), loss_reduction="sum", lr=0.0)
    private.optimizer.zero_grad()
    (private.model(x) * target).sum().backward()
    private.optimizer.step()
    sums = [p.summed_grad for p in private.parameters]
    assert [s.dtype for s in sums] == [p.dtype for p in private.parameters]
    total = torch.cat([s.double().flatten() for s in sums])
    assert (total - clipped_flat(own, 1.0)).norm() < 1e-4


def test_hooks_of_the_users_see_the_gradients_as_they_are():
    model = mlp(dtype=torch.float64)
    x, target = doubles(3, 4), target_for(3, 3)
    seen: list[Tensor] = []
    plain = copy.deepcopy(model)
    plain[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    (plain(x.clone().requires_grad_()) * target).sum().backward()
    trainer = Trainer(copy.deepcopy(model), (4,), joint(), reduction="sum")
    trainer.plain[0].register_full_backward_hook(lambda m, i, o: seen.append(o[0].clone()))
    trainer.plain[2].register_forward_hook(lambda m, i, o: o + 0)
    trainer.step(x.clone().requires_grad_(), target)
    assert torch.allclose(seen[0], seen[1])
    expected = clipped_flat(own_gradients(model, x, target), 1.0)
    assert (summed(trainer.plain) - expected).norm() < 1e-8


def test_a_hook_that_scales_a_hidden_gradient_is_part_of_the_model():
    # As gradient clipping between layers is: it comes before the layers below are measured.
    trainer = Trainer(mlp(), (4,), joint(), reduction="sum")
    trainer.plain[2].register_full_backward_pre_hook(lambda m, g: (1e8 * g[0],))
    trainer.plain[0].register_full_backward_pre_hook(lambda m, g: (1e8 * g[0],))
    x, target = doubles(3, 4), target_for(3, 3)
    check_sensitivity(trainer, x, target)
    check_independence(trainer, x, target)


# Torch's, on Opacus's hooks on a first layer.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_training_without_noise_is_training_with_flat_clipping():
    def trained(**options: object) -> Tensor:
        private = make_private(mlp(), lr=0.5, max_grad_norm=0.3, **options)
        for size in (6, 3, 8):
            train_step(private, size)
        return values(private)

    ours = trained(backprop=BackpropClipping())
    assert (ours - trained(clipping="flat")).norm() < 1e-5
