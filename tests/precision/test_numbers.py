"""In low precision: sums, noise and what the optimizer steps on."""

import pytest
import torch
from torch import nn

from opacus_bpclip import BackpropClipping
from tests.budgets import layerwise
from tests.checks import Trainer, joint, linear_loss
from tests.precision.test_sensitivity import LOW, WAYS, trainer_of

MANY = 256


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3)
    )


def _batch(count: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 6, generator=generator).to(dtype)
    return x, torch.randn(count, 3, generator=generator).to(dtype)


@WAYS
@pytest.mark.parametrize("clipping", [BackpropClipping(), layerwise(bound="exact")], ids=str)
def test_a_sum_over_a_large_batch_is_no_coarser_than_float32(autocast, clipping):
    trainer = trainer_of(_model(), (2, 6), clipping, autocast)
    x, target = _batch(MANY, next(trainer.plain.parameters()).dtype)
    sums = trainer.released(x, target)
    assert {total.dtype for total in sums.values()} == {torch.float32}
    parts = [
        joint(trainer.released(x[rows], target[rows])).double()
        for rows in torch.arange(MANY).split(1)
    ]
    # Rounded to bfloat16 a sum of so many would be off by some hundredths.
    assert (joint(sums) - sum(parts)).norm() <= 1e-4 * trainer.optimizer.max_grad_norm


@WAYS
def test_it_is_the_float32_gradient_up_to_the_models_own_rounding(autocast):
    x, target = _batch(8, torch.float32)
    found = []
    for low in (True, False):
        model = _model()
        trainer = (
            trainer_of(model, (2, 6), BackpropClipping(), autocast, max_grad_norm=1e6)
            if low
            else Trainer(
                model,
                (2, 6),
                BackpropClipping(),
                max_grad_norm=1e6,
                reduction="sum",
                dtype=torch.float32,
            )
        )
        dtype = next(trainer.plain.parameters()).dtype
        found.append(joint(trainer.released(x.to(dtype), target.to(dtype))))
    assert (found[0] - found[1]).norm() <= 0.02 * found[1].norm()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam], ids=lambda k: k.__name__)
def test_noise_is_added_in_float32_and_the_optimizer_steps_in_bfloat16(kind):
    trainer = trainer_of(_model(), (2, 6), BackpropClipping(), False, noise_multiplier=1.0)
    trainer.optimizer.original_optimizer = kind(trainer.plain.parameters(), lr=0.1)
    before = [p.detach().clone() for p in trainer.plain.parameters()]
    trainer.step(*_batch(4, LOW))
    for p, earlier in zip(trainer.plain.parameters(), before, strict=True):
        assert p.summed_grad.dtype == torch.float32
        assert p.grad.dtype == p.dtype == LOW
        assert not torch.equal(p, earlier)


def test_an_empty_batch_gets_its_noise():
    trainer = trainer_of(_model(), (2, 6), BackpropClipping(), False, noise_multiplier=1.0)
    trainer.step(*_batch(0, LOW))
    assert all(p.grad.dtype == LOW and p.grad.any() for p in trainer.plain.parameters())


def test_backward_under_autocast_makes_the_same_sums():
    trainer = trainer_of(_model(), (2, 6), BackpropClipping(), True)
    x, target = _batch(6, torch.float32)
    expected = joint(trainer.released(x, target))
    trainer.optimizer.zero_grad()
    with torch.autocast("cpu", LOW):
        linear_loss(trainer.model(x), target, "sum").backward()
        trainer.optimizer.step()
    found = torch.cat([p.summed_grad.flatten() for p in trainer.plain.parameters()])
    torch.testing.assert_close(found.sort().values, expected.sort().values, rtol=0, atol=1e-6)
