"""What an example contributes depends on nothing but that example."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer, check_independence, joint
from tests.strategies import BOUNDS
from tests.test_sensitivity import neighbours


@given(neighbours())
def test_a_batch_sums_what_its_examples_contribute_alone(case):
    check_independence(*case)


@given(neighbours(), st.randoms(use_true_random=False))
def test_the_order_of_a_batch_does_not_matter(case, random):
    trainer, x, target = case
    order = list(range(len(x)))
    random.shuffle(order)
    straight = joint(trainer.released(x, target))
    shuffled = joint(trainer.released(x[order], target[order]))
    assert (straight - shuffled).norm() <= 1e-9 * trainer.optimizer.max_grad_norm * len(x)


@pytest.mark.parametrize("bound", BOUNDS)
def test_batch_size_does_not_reach_examples_just_below_the_clip(bound):
    # The reference code clips g_i / |B|: one example more rescales every example below the clip,
    # and its sum moves by twice what was claimed.
    model = nn.Linear(1, 1, bias=False)
    trainer = Trainer(model, (1,), BackpropClipping(bound=bound, max_input_norm=1.0))
    x = torch.full((65, 1), 0.999, dtype=torch.float64)
    target = torch.full((65, 1), 0.999, dtype=torch.float64)
    target[-1] = -1e6
    check_independence(trainer, x, target)
    moved = joint(trainer.released(x, target)) - joint(trainer.released(x[:-1], target[:-1]))
    assert moved.norm() <= 1.0
