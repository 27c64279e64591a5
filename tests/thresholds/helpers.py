"""A trainer whose thresholds stay where they were put, and what a step releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from opacus_bpclip import AdaptiveThreshold, BackpropClipping, ThresholdSchedule
from opacus_bpclip.optimizer.scales import noise_of
from tests.budgets import layerwise
from tests.checks import ROUNDING, Trainer, difference, joint
from tests.helpers import Private, batch, hand_over, make_private, mlp
from tests.strategies import BOUNDS

POLICIES = st.sampled_from(
    [AdaptiveThreshold(), AdaptiveThreshold(count_noise=0.6), ThresholdSchedule(0.5, 0.1, 9)]
)


class SideBySide(nn.Module):
    """Two layers on the same input, which both get the loss's gradient as it is."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.body(x), self.head(x)], dim=1)


class Pinned(Trainer):
    """The real engine and optimizer; every step has the same thresholds."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        own = self.optimizer._hooks._sensitivities
        self.state = own.state_dict() or {"thresholds": own.thresholds, "steps": 0}

    @property
    def names(self) -> list[str]:
        return list(self.state["thresholds"])

    def put(self, *values: float) -> None:
        """Set the thresholds, in the layers' order."""
        self.state["thresholds"] = dict(zip(self.names, values, strict=True))
        self.optimizer._hooks._sensitivities.load_state_dict(self.state)

    def released(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return what the step would add noise to, in units of the noise of ``noise_multiplier`` 1.

        One vector for each layer, and one for the counts.
        """
        hooks, delta = self.optimizer._hooks, self.optimizer.max_grad_norm
        stds = noise_of(hooks._sensitivities, 1.0, delta)
        self.step(x, target)
        self.optimizer._hooks._sensitivities.load_state_dict(self.state)
        sums = {
            name: torch.cat([_over(p, stds).cpu() for p in group.parameters])
            for name, group in hooks._groups.items()
        }
        counts = [_over(count, stds).cpu() for count in hooks._sensitivities.counts.values()]
        return sums | {"counts": torch.cat([*counts, torch.zeros(0, dtype=torch.float64)])}


def _over(p: nn.Parameter, stds: Mapping[Tensor, float]) -> Tensor:
    total: Tensor = p.summed_grad  # type: ignore[attr-defined]
    return total.detach().flatten().double() / stds[p]


def moved_by_last(trainer: Pinned, x: Tensor, target: Tensor) -> float:
    """Return how far the last example moves all that a step releases, in units of noise."""
    with_z = trainer.released(x, target)
    return float(joint(difference(with_z, trainer.released(x[:-1], target[:-1]))).norm())


def check_one_mechanism(trainer: Pinned, x: Tensor, target: Tensor) -> None:
    """The last example moves gradient and counts together by at most one unit of noise."""
    moved = moved_by_last(trainer, x, target)
    # The counts follow a relative error of a norm five times over.
    slack = 1 + 10 * ROUNDING[target.dtype] * len(x)
    assert moved <= slack, f"moved by {moved} > 1 unit of noise"


@st.composite
def moving_clippings(draw: st.DrawFn) -> BackpropClipping:
    """Ways to clip with thresholds that move, and noise scaled by layer."""
    bound = draw(st.sampled_from(BOUNDS))
    allocation = draw(st.sampled_from(["joint", "equal", "dimension"]))
    noise = "equal" if allocation == "joint" else draw(st.sampled_from(["equal", "dimension"]))
    return layerwise(
        bound=bound,
        max_input_norm=3.0 if bound == "product" else draw(st.sampled_from([None, 1.0])),
        allocation=allocation,
        threshold=draw(POLICIES),
        layer_noise=noise,
        propagate=draw(st.sampled_from(["clipped", "unclipped"])),
    )


QUANTILE, RATE = 0.5, 0.3


def adaptive(**options: Any) -> AdaptiveThreshold:
    given = {
        "target_unclipped_quantile": QUANTILE,
        "clipbound_learning_rate": RATE,
        "initial": 1.0,
        **options,
    }
    return AdaptiveThreshold(**given)


def adaptive_model(**options: Any) -> Private:
    given = {"backprop": BackpropClipping(threshold=adaptive(initial=0.5)), "lr": 0.01, **options}
    return make_private(mlp(), loss_reduction="sum", **given)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="sum")


def train_step(private: Private, size: int = 6) -> None:
    private.optimizer.zero_grad()
    hand_over(private, size)
    loss_of(private.model, *batch(size)).backward()
    private.optimizer.step()
