"""Moving thresholds through the real engine: one example moves gradient and counts by one unit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.layers import DPGRU
from torch import Tensor, nn

from opacus_bpclip import AdaptiveThreshold, BackpropClipping
from tests.budgets import layerwise
from tests.checks import HUGE, check_independence, linear_loss, squared_loss
from tests.helpers import mlp, one_layer
from tests.joint.helpers import clipped_flat, outputs_of, own_gradients
from tests.neighbours import hostile_rows
from tests.strategies import architectures
from tests.thresholds.helpers import (
    Pinned,
    SideBySide,
    check_one_mechanism,
    moved_by_last,
    moving_clippings,
)


@st.composite
def neighbours(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Pinned, Tensor, Tensor]:
    """A private model, and a hostile batch whose last example is the one to be added."""
    case = draw(architectures())
    trainer = Pinned(
        case.layer.to(dtype),
        case.shape,
        draw(moving_clippings()),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        # In single precision a plain mean is refused.
        reduction=draw(st.sampled_from(["mean", "sum"] if dtype == torch.float64 else ["sum"])),
        loss=draw(st.sampled_from([linear_loss, squared_loss])),
        dtype=dtype,
    )
    trainer.put(*(draw(st.sampled_from([1e-3, 0.1, 1.0, 30.0])) for _ in trainer.names))
    outputs = outputs_of(trainer.plain, case.shape)
    return trainer, *hostile_rows(draw, trainer.plain, case.shape, outputs, dtype)


@settings(max_examples=40)
@given(neighbours(torch.float64))
def test_one_example_moves_gradient_and_counts_by_at_most_one_unit(
    case: tuple[Pinned, Tensor, Tensor],
) -> None:
    check_one_mechanism(*case)


@settings(max_examples=40)
@given(neighbours(torch.float32))
def test_the_bound_holds_in_float32(case: tuple[Pinned, Tensor, Tensor]) -> None:
    check_one_mechanism(*case)


@settings(max_examples=30)
@given(neighbours(torch.float64))
def test_gradient_and_counts_are_sums_over_examples(case: tuple[Pinned, Tensor, Tensor]) -> None:
    check_independence(*case)


class Used(nn.Module):
    """Two layers, the first used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.body(x)))


class Read(nn.Module):
    """A recurrent network over four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.head = DPGRU(1, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.network(x.unsqueeze(-1))[0][:, -1])


class Scaled(nn.Module):
    """A function on a parameter, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


WAYS: dict[str, dict[str, object]] = {
    "joint": {"allocation": "joint"},
    "equal noise": {"allocation": "equal"},
    "scaled noise": {"allocation": "dimension", "layer_noise": "dimension"},
    "factors": {"allocation": "equal", "layer_noise": {"head": 5.0}},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sides": lambda: SideBySide(nn.Linear(4, 3), nn.Linear(4, 3)),
    "used": Used,
    "read": Read,
    "scaled": Scaled,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_the_bound_is_attained_where_it_can_be(way: str, model: str) -> None:
    torch.manual_seed(3)
    clipping = BackpropClipping(threshold=AdaptiveThreshold(count_noise=0.6), **WAYS[way])  # type: ignore[arg-type]
    trainer = Pinned(MODELS[model](), (4,), clipping, max_grad_norm=0.7)
    x = torch.randn(4, 4).double()
    target = torch.randn(4, outputs_of(trainer.plain, (4,))).double()
    target[-1] *= HUGE
    moved = moved_by_last(trainer, x, target)
    assert moved <= 1 + 1e-6
    # A layer's clipped gradient is what flows to the layers below, which may be far from theirs.
    assert moved > (0.99 if way == "joint" or model == "sides" else 0.3)


@pytest.mark.parametrize("threshold", [0.3, 2.0, 40.0])
def test_a_joint_step_is_flat_clipping_at_the_threshold_times_a_public_number(
    threshold: float,
) -> None:
    torch.manual_seed(0)
    clipping = BackpropClipping(threshold=AdaptiveThreshold())
    trainer = Pinned(mlp(), (4,), clipping, max_grad_norm=0.7)
    trainer.put(threshold)
    x, target = torch.randn(6, 4).double() * 3, torch.randn(6, 3).double()
    expected = clipped_flat(own_gradients(mlp(dtype=torch.float64), x, target), threshold)
    trainer.step(x, target)
    found = torch.cat([p.summed_grad.flatten() for p in trainer.plain.parameters()])
    assert torch.allclose(found, expected * 0.7 / threshold, rtol=1e-9)


def test_layers_clip_at_their_own_thresholds() -> None:
    torch.manual_seed(0)
    clipping = BackpropClipping(allocation="equal", threshold=AdaptiveThreshold())
    trainer = Pinned(one_layer(), (4,), clipping)
    trainer.put(0.9)
    x, target = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    expected = clipped_flat(own_gradients(one_layer().double(), x, target), 0.9) / 0.9
    trainer.step(x, target)
    found = torch.cat([p.summed_grad.flatten() for p in trainer.plain.parameters()])
    assert torch.allclose(found, expected, rtol=1e-9)


@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2), st.floats(1e-3, 1e3))
def test_sensitivities_follow_the_thresholds_and_stay_together(
    thresholds: list[float], max_grad_norm: float
) -> None:
    clipping = layerwise(allocation="equal", threshold=AdaptiveThreshold())
    trainer = Pinned(mlp(), (4,), clipping, max_grad_norm=max_grad_norm)
    trainer.put(*thresholds)
    found = list(trainer.optimizer.layer_sensitivities.values())
    assert math.hypot(*found) == pytest.approx(max_grad_norm)
    assert found[0] / found[1] == pytest.approx(thresholds[0] / thresholds[1])
    assert list(trainer.optimizer.thresholds.values()) == thresholds
