"""In low precision, too, one example moves the sum by no more than is claimed, and by as much."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import BackpropClipping
from tests.checks import (
    HUGE,
    Trainer,
    check_independence,
    check_sensitivity,
    joint,
)
from tests.functions.parts import PARTS, D, Stack, T
from tests.neighbours import neighbours

LOW = torch.bfloat16
WAYS = pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 modules", "autocast"])


def trainer_of(model: nn.Module, shape: tuple[int, ...], clipping, autocast: bool, **options):
    """A model in bfloat16, or one in float32 under autocast; the loss is a sum."""
    dtype = torch.float32 if autocast else LOW
    options = {"reduction": "sum", "dtype": dtype, "autocast": autocast} | options
    return Trainer(model, shape, clipping, **options)


def low(autocast: bool):
    """Neighbouring batches of a model in low precision."""

    def make(model: nn.Module, *args, dtype, **options):
        return trainer_of(model, *args, autocast, **options)

    dtype = torch.float32 if autocast else LOW
    return neighbours(make, dtype, reduction=st.just("sum"))


@WAYS
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(autocast):
    @settings(max_examples=100)
    @given(low(autocast))
    def search(case):
        check_sensitivity(*case)

    search()


@WAYS
def test_an_examples_contribution_is_its_own(autocast):
    @settings(max_examples=40)
    @given(low(autocast))
    def search(case):
        check_independence(*case)

    search()


# torch solves no linear equations in bfloat16, as the orthogonal parametrization does.
NAMES = sorted(set(PARTS) - {"orthogonal"})


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_functions_on_parameters(name, autocast):
    torch.manual_seed(0)
    for clipping in (BackpropClipping(), BackpropClipping(allocation="equal")):
        trainer = trainer_of(Stack([name]), (T, D), clipping, autocast)
        dtype = next(trainer.plain.parameters()).dtype
        x, target = torch.randn(5, T, D).to(dtype), torch.randn(5, 2).to(dtype)
        target[-1] *= HUGE
        # In a batch of the same shape: kernels may treat the end of a tensor otherwise.
        together = joint(trainer.released(x, target))
        parts = [joint(trainer.released(x, target * row[:, None])) for row in torch.eye(5)]
        assert (together - sum(parts)).norm() <= 1e-5
        assert parts[-1].norm() <= 1
        fewer = joint(trainer.released(x[:-1], target[:-1]))
        assert (together - fewer).norm() <= 1 + 1e-3


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_the_sensitivity_is_attained(name, autocast):
    torch.manual_seed(0)
    trainer = trainer_of(Stack([name]), (T, D), BackpropClipping(), autocast, max_grad_norm=0.1)
    dtype = next(trainer.plain.parameters()).dtype
    x, target = torch.randn(1, T, D).to(dtype), torch.full((1, 2), 100.0).to(dtype)
    moved = joint(trainer.released(x, target)).norm()
    assert 0.999 * 0.1 <= moved <= 0.1


@WAYS
def test_an_example_that_is_not_finite_contributes_nothing(autocast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(T, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 2))
    trainer = trainer_of(model, (T, D), BackpropClipping(), autocast)
    dtype = next(trainer.plain.parameters()).dtype
    x, target = torch.randn(3, T, D).to(dtype), torch.randn(3, 2).to(dtype)
    x[-1, 0, 0] = torch.inf
    with_it, without = trainer.released(x, target), trainer.released(x[:-1], target[:-1])
    torch.testing.assert_close(joint(with_it), joint(without), rtol=0, atol=1e-6)
