"""What an example contributes depends on nothing but that example."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.budgets import layerwise
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
    trainer = Trainer(model, (1,), layerwise(bound=bound, max_input_norm=1.0))
    x = torch.full((65, 1), 0.999, dtype=torch.float64)
    target = torch.full((65, 1), 0.999, dtype=torch.float64)
    target[-1] = -1e6
    check_independence(trainer, x, target)
    moved = joint(trainer.released(x, target)) - joint(trainer.released(x[:-1], target[:-1]))
    assert moved.norm() <= 1.0


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("layer", "x", "target"),
    [
        pytest.param(
            nn.Linear(4, 2, bias=False),
            torch.full((1, 4), 1e-8),
            torch.full((1, 2), 2.5e19),
            id="columns that vanish beside gradients whose squares overflow",
        ),
        pytest.param(
            nn.LayerNorm(2),
            torch.tensor([[[1.0, -1.0]] * 4]),
            torch.tensor([[2e38, -2e38, -2e38, 2e38] * 2]),
            id="gradients that cancel unless their sum overflows",
        ),
        pytest.param(
            nn.Embedding(3, 1),
            torch.ones(1, 4, dtype=torch.long),
            torch.tensor([[2e38, 2e38, -2e38, -2e38]]),
            id="a layer that is clipped around",
        ),
    ],
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_what_overflows_does_not_depend_on_the_size_of_the_batch(
    layer, x, target, bound, normalize
):
    # A mean loss divides by the batch size: a gradient out of range in a batch of one may be in
    # range in a larger batch.
    clipping = layerwise(bound=bound, normalize=normalize)
    trainer = Trainer(
        copy.deepcopy(layer), x.shape[1:], clipping, loss=_careful_loss, dtype=torch.float32
    )
    sums = [
        joint(
            trainer.released(
                torch.cat([x, x.repeat(n - 1, *[1] * (x.dim() - 1))]),
                torch.cat([target, torch.zeros(n - 1, target.shape[1])]),
            )
        )
        for n in (1, 2, 10, 1000)
    ]
    for other in sums[1:]:
        torch.testing.assert_close(other, sums[0], rtol=1e-5, atol=1e-6)


def _careful_loss(output, target, reduction):
    """As `linear_loss`, dividing before anything overflows."""
    return (output.flatten(1) * (target / len(output))).sum()
