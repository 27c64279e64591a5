"""Search for a violation of the sensitivity through the real engine, and show the bound tight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.budgets import layerwise
from tests.checks import Trainer, check_sensitivity, check_silent, joint
from tests.joint.helpers import outputs_of
from tests.neighbours import REDUCTIONS, neighbours
from tests.strategies import (
    BOUNDS,
    MODES,
    Branches,
    architectures,
)
from tests.worst_cases import spike_upstream


@given(neighbours(reduction=REDUCTIONS))
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)


@given(neighbours(dtype=torch.float32, reduction=REDUCTIONS))
def test_the_bound_holds_in_float32_at_every_scale(case):
    check_sensitivity(*case)


def _dirac(shape: tuple[int, ...], height: float = 1e4) -> torch.Tensor:
    x = torch.zeros(1, *shape, dtype=torch.float64)
    x[(0, *(size // 2 for size in shape))] = height
    return x


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "sequence": (lambda: nn.Linear(5, 3), (4, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, groups=2, padding=1), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 7, 7)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2, padding="same"), (1, 5, 5, 5)),
    "reflect": (lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 4, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_a_dirac_example_reaches_the_bound(bound, normalize, layer):
    make, shape = LAYERS[layer]
    model = make().double()
    x = _dirac(shape)
    clipping = layerwise(bound=bound, normalize=normalize, max_input_norm=3.0)
    trainer = Trainer(model, shape, clipping, max_grad_norm=2.0)
    reached = joint(trainer.released(x, spike_upstream(model, x, 1e4))).norm()
    assert 0.999 * 2.0 <= reached <= 2.0


@pytest.mark.parametrize(("bound", "normalize"), MODES)
@pytest.mark.parametrize("allocation", ["equal", "dimension"])
def test_one_example_saturates_every_layer_at_once(bound, normalize, allocation):
    model = Branches(
        nn.Linear(6, 2),
        nn.Linear(6, 3, bias=False),
        nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1)),
    )
    clipping = layerwise(bound=bound, normalize=normalize, allocation=allocation)
    trainer = Trainer(model, (6,), clipping, max_grad_norm=1.5)
    x = _dirac((6,))
    target = torch.zeros(1, 2 + 3 + 12, dtype=torch.float64)
    target[0, [0, 2, 5 + 3]] = 1e4
    assert 0.999 * 1.5 <= joint(trainer.released(x, target)).norm() <= 1.5


@st.composite
def normalized(draw):
    # Far above the stability constant.
    sizes = st.sampled_from([1e-3, 1.0, 1e3, 1e6])
    case = draw(architectures())
    clipping = layerwise(
        bound="exact",
        normalize=True,
        stability=1e-30,
        max_input_norm=draw(st.sampled_from([None, 1.0, 3.0])),
    )
    trainer = Trainer(case.layer, case.shape, clipping)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    x = torch.randn(1, *case.shape, dtype=torch.float64, generator=generator) * draw(sizes)
    outputs = outputs_of(trainer.plain, case.shape)
    target = torch.randn(1, outputs, dtype=torch.float64, generator=generator) * draw(sizes)
    return trainer, x, target


@given(normalized())
def test_exact_normalize_reaches_the_bound_for_every_example(case):
    trainer, x, target = case
    for layer, contribution in trainer.released(x, target).items():
        limit = trainer.optimizer.layer_sensitivities[layer]
        # Zero is the one gradient that cannot be normalised (a dead ReLU, say).
        assert contribution.norm() == 0 or 0.999 * limit <= contribution.norm() <= limit


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "target"])
def test_an_example_that_is_not_finite_contributes_nothing(bound, value, where):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    trainer = Trainer(model, (1, 5, 5), layerwise(bound=bound))
    x = torch.randn(4, 1, 5, 5, dtype=torch.float64)
    target = torch.randn(4, 2, dtype=torch.float64)
    (x if where == "input" else target)[-1].view(-1)[1] = value
    check_silent(trainer, x, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bound", BOUNDS)
def test_vanishing_columns_do_not_blow_the_gradient_up_to_nan(bound, normalize, dtype):
    # Scaled up twice without a limit, a gradient is infinite, and infinity times zero nan.
    model = nn.Sequential(nn.RMSNorm(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    clipping = layerwise(bound=bound, normalize=normalize)
    trainer = Trainer(model, (2,), clipping, max_grad_norm=1e3, dtype=dtype)
    check_sensitivity(trainer, torch.zeros(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype))


@pytest.mark.parametrize(
    "make",
    [lambda: nn.LayerNorm(2), lambda: nn.RMSNorm(2), lambda: nn.GroupNorm(1, 2)],
    ids=["layer", "rms", "group"],
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_an_input_whose_squares_overflow_contributes_nothing(bound, make):
    trainer = Trainer(make(), (2,), layerwise(bound=bound), dtype=torch.float32)
    x = torch.tensor([[1.0, 2.0], [1.5e28, -2e27]])
    check_silent(trainer, x, torch.ones(2, 2))
