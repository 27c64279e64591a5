"""One example reaches the joint budget, and no factor is smaller than it must be."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opacus_bpclip import BackpropClipping
from tests.checks import Trainer
from tests.joint.flat import KINDS, Repeated, batch_of
from tests.joint.helpers import (
    ATTAINED,
    joint,
    own_gradients,
    released,
)
from tests.strategies import MODES, architectures
from tests.worst_cases import WORST_CASES, spike_upstream

# Attainment


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("kind", WORST_CASES, ids=lambda kind: kind.__name__)
def test_one_example_reaches_delta(kind, bound, normalize):
    torch.manual_seed(0)
    worst = WORST_CASES[kind]
    model, x = worst.make().double(), worst.example
    target = spike_upstream(model, x, 1e6, worst.output)
    trainer = Trainer(
        model, worst.shape, joint(bound=bound, normalize=normalize), max_grad_norm=2.0
    )
    assert ATTAINED * 2.0 <= released(trainer, x, target).norm() <= 2.0


@settings(max_examples=100)
@given(st.data())
def test_no_factor_of_the_exact_bound_is_smaller_than_it_must_be(data):
    case = data.draw(architectures())
    model, limit = case.layer.double(), data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
    x, target = batch_of(model, case.shape, torch.float64)
    own = own_gradients(model, x, target)
    trainer = Trainer(copy.deepcopy(model), case.shape, BackpropClipping(), max_grad_norm=limit)
    for i, gradient in enumerate(own):
        contribution = released(trainer, x[i : i + 1], target[i : i + 1])
        needed = min(float(gradient.norm()), limit)
        assert contribution.norm() >= needed * (1 - 1e-6) - 1e-12 * limit
        assert contribution.norm() <= limit


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_uses_that_add_up_reach_delta_together(kind, normalize):
    torch.manual_seed(0)
    model = Repeated(kind).double()
    trainer = Trainer(model, (4,), joint(normalize=normalize), max_grad_norm=0.9)
    x, target = batch_of(model, (4,), torch.float64)
    reached = released(trainer, x[:1], 1e6 * target[:1]).norm()
    assert ATTAINED * 0.9 <= reached <= 0.9
