"""Functions on parameters: one example moves the sum by no more than is claimed, and by as much."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_bpclip import BackpropClipping
from tests.checks import (
    HUGE,
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    joint,
)
from tests.functions.parts import PARTS, D, Stack, T, Twice
from tests.joint.helpers import joint_clippings
from tests.strategies import seeds

NAMES = sorted(PARTS)

# Input clipping needs the batch where a layer's rule has it.
LAYERWISE = st.builds(
    BackpropClipping,
    allocation=st.sampled_from(["equal", "dimension"]),
    bound=st.sampled_from(["weighted", "exact"]),
    normalize=st.booleans(),
)
CLIPPINGS = st.one_of(
    joint_clippings().filter(lambda clipping: clipping.max_input_norm is None), LAYERWISE
)
SCALES = st.sampled_from([1e-3, 1.0, 1e3, HUGE])


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=2),
    CLIPPINGS,
    SCALES,
    SCALES,
    st.booleans(),
    st.sampled_from(["mean", "sum"]),
    seeds,
)
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(
    names, clipping, size, slope, twice, reduction, seed
):
    torch.default_generator.manual_seed(seed)
    model = Twice(names[0]) if twice else Stack(names)
    trainer = Trainer(model, (T, D), clipping, reduction=reduction)
    x = torch.randn(3, T, D).double()
    x[0] *= size
    target = torch.randn(3, 2).double()
    target[0] *= slope
    check_sensitivity(trainer, x, target)


@settings(max_examples=25)
@given(st.sampled_from(NAMES), CLIPPINGS, SCALES, seeds)
def test_an_examples_contribution_is_its_own(name, clipping, size, seed):
    torch.default_generator.manual_seed(seed)
    trainer = Trainer(Stack([name]), (T, D), clipping)
    x = torch.randn(4, T, D).double()
    x[0] *= size
    check_independence(trainer, x, torch.randn(4, 2).double())


@pytest.mark.parametrize("name", NAMES)
def test_the_sensitivity_is_attained(name):
    torch.manual_seed(0)
    trainer = Trainer(Stack([name]), (T, D), BackpropClipping(), max_grad_norm=0.1)
    x, target = torch.randn(1, T, D).double(), torch.full((1, 2), 100.0).double()
    moved = joint(trainer.released(x, target)).norm()
    assert 0.999 * 0.1 <= moved <= 0.1


@pytest.mark.parametrize("name", NAMES)
def test_an_example_that_is_not_finite_contributes_nothing(name):
    torch.manual_seed(0)
    trainer = Trainer(Stack([name]), (T, D), BackpropClipping())
    x = torch.randn(3, T, D).double()
    x[-1, 0, 0] = torch.nan
    check_silent(trainer, x, torch.randn(3, 2).double())


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_makes_a_sum_of_zeros(name):
    torch.manual_seed(0)
    trainer = Trainer(Stack([name]), (T, D), BackpropClipping())
    x, target = torch.randn(3, T, D).double(), torch.randn(3, 2).double()
    trainer.step(x, target)
    assert not joint(trainer.released(x[:0], target[:0])).any()
