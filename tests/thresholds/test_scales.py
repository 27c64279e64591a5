"""The noise of layers and counts: what it adds up to, and that no other division is better."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opacus_bpclip import AdaptiveThreshold, BackpropClipping, CoverageError
from opacus_bpclip.optimizer.scales import noise_of, scales
from tests.budgets import layerwise
from tests.helpers import make_private, mlp
from tests.thresholds.helpers import Pinned

positive = st.floats(1e-3, 1e3)
layers = st.dictionaries(st.sampled_from("abcd"), st.tuples(positive, positive), min_size=1)


@given(layers, positive, st.integers(0, 5), st.floats(0.51, 50), st.booleans())
def test_gradient_and_counts_are_one_mechanism_of_the_noise_multiplier(
    found: dict[str, tuple[float, float]],
    noise_multiplier: float,
    counts: int,
    count_noise: float,
    scaled: bool,
) -> None:
    deltas = {name: delta for name, (delta, _) in found.items()}
    weights = {name: weight for name, (_, weight) in found.items()} if scaled else None
    own = scales(noise_multiplier, deltas, weights=weights, counts=counts, count_noise=count_noise)
    spent = sum((deltas[name] / own.layers[name]) ** 2 for name in deltas)
    spent += counts / (4 * own.counts**2) if counts else 0
    assert spent == pytest.approx(1 / noise_multiplier**2)


@given(layers, st.lists(positive, min_size=4, max_size=4))
def test_no_other_division_has_less_weighted_noise(
    found: dict[str, tuple[float, float]], other: list[float]
) -> None:
    deltas = {name: delta for name, (delta, _) in found.items()}
    weights = {name: weight for name, (_, weight) in found.items()}
    best = scales(1.0, deltas, weights=weights).layers
    shares = dict(zip(deltas, other, strict=False))
    # Scaled so that it costs the same.
    too_much = math.sqrt(sum((deltas[name] / shares[name]) ** 2 for name in deltas))
    rival = {name: share * too_much for name, share in shares.items()}

    def harm(stds: dict[str, float]) -> float:
        return sum(weights[name] * stds[name] ** 2 for name in stds)

    assert harm(best) <= harm(rival) * (1 + 1e-9)


def test_without_options_every_number_has_the_noise_of_opacus() -> None:
    for clipping in (BackpropClipping(), layerwise(allocation="dimension")):
        trainer = Pinned(nn.Sequential(nn.Linear(4, 3)), (4,), clipping, max_grad_norm=0.7)
        stds = noise_of(trainer.optimizer._hooks._sensitivities, 1.3, 0.7)
        assert set(stds.values()) == {1.3 * 0.7}


def test_a_factor_lowers_the_noise_of_its_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    clipping = layerwise(allocation="equal", layer_noise={"1": 16.0})
    trainer = Pinned(model, (4,), clipping)
    stds = noise_of(trainer.optimizer._hooks._sensitivities, 1.0, 1.0)
    assert stds[model[0].weight] == pytest.approx(2 * stds[model[1].weight])


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_the_noise_that_is_drawn_is_the_noise_that_is_claimed(allocation: str) -> None:
    torch.manual_seed(0)
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        threshold=AdaptiveThreshold(),
        layer_noise="equal" if allocation == "joint" else "dimension",
    )
    trainer = Pinned(
        nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 3)),
        (30,),
        clipping,
        noise_multiplier=1.3,
        max_grad_norm=0.7,
        reduction="sum",
        noise_generator=torch.Generator().manual_seed(0),
    )
    own = trainer.optimizer._hooks._sensitivities
    stds = noise_of(own, 1.3, 0.7)
    x, target = torch.randn(5, 30).double(), torch.randn(5, 3).double()
    draws: dict[torch.Tensor, list[torch.Tensor]] = {p: [] for p in stds}
    fractions = []
    for _ in range(60):
        trainer.step(x, target)
        fractions.append(list(own.released.values()))
        own.load_state_dict(trainer.state)
        for p in trainer.plain.parameters():
            draws[p].append((p.grad - p.summed_grad).flatten())
    for p in trainer.plain.parameters():
        drawn = torch.cat(draws[p])
        assert float(drawn.std()) == pytest.approx(stds[p], rel=5 / (2 * len(drawn)) ** 0.5)
    released = torch.tensor(fractions).double()
    count = next(iter(own.counts.values()))
    spread = released.std(dim=0) / stds[count]
    assert ((spread - 1).abs() < 5 / (2 * len(released)) ** 0.5).all()
    assert trainer.engine.accountant.history == [(1.3, 1 / len(trainer.loader), 60)]


def test_a_factor_of_no_layer_is_refused_before_training() -> None:
    clipping = layerwise(allocation="equal", layer_noise={"head": 2.0})
    with pytest.raises(CoverageError, match=r"does not train: head\. It has 0, 2\."):
        make_private(mlp(), backprop=clipping)
