"""Opacus's recurrent networks: all time steps of an example together stay within one limit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPGRU, DPLSTM, DPRNN
from opacus.layers.dp_rnn import RNNLinear
from torch import Tensor, nn

from tests.budgets import layerwise
from tests.checks import (
    Trainer,
    check_independence,
    check_sensitivity,
    check_silent,
    linear_loss,
    squared_loss,
)
from tests.readers import FEATURES, STEPS, Reader
from tests.strategies import BOUNDS, MODES, hostile_batches, hostile_examples, scales, seeds


@st.composite
def readers(draw):
    torch.manual_seed(draw(seeds))
    return Reader(
        draw(st.sampled_from([DPRNN, DPLSTM, DPGRU])),
        packed=draw(st.booleans()),
        num_layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def neighbours(draw, dtype=torch.float64):
    model = draw(readers())
    bound, normalize = draw(st.sampled_from(MODES))
    trainer = Trainer(
        model,
        (STEPS, FEATURES),
        layerwise(bound=bound, normalize=normalize),
        max_grad_norm=draw(st.sampled_from([1e-3, 1.0, 1e3])),
        reduction=draw(st.sampled_from(["mean", "sum"])),
        dtype=dtype,
    )
    # torch cannot pack an empty batch.
    companions = draw(hostile_batches((STEPS, FEATURES), dtype, min_size=int(model.packed)))
    x = torch.cat([companions, draw(hostile_examples((STEPS, FEATURES), dtype))[None]])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows = torch.tensor([draw(scales) for _ in range(len(x))], dtype=dtype)
    target = torch.randn(len(x), 2, dtype=dtype, generator=generator) * rows[:, None]
    return trainer, x, target


@given(neighbours())
def test_one_sequence_moves_the_sum_by_at_most_its_sensitivity(case):
    check_sensitivity(*case)


@given(neighbours(dtype=torch.float32))
def test_the_bound_holds_in_float32(case):
    check_sensitivity(*case)


@given(neighbours())
def test_a_sequences_contribution_depends_on_it_alone(case):
    check_independence(*case)


@given(readers(), st.sampled_from(BOUNDS[1:]))
def test_without_clipping_the_sum_is_autograds(model, bound):
    model = model.double()
    x, target = torch.randn(4, STEPS, FEATURES).double(), torch.randn(4, 2).double()
    squared_loss(model(x), target, "sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    clipping = layerwise(bound=bound, max_input_norm=None)
    trainer = Trainer(model, (STEPS, FEATURES), clipping, max_grad_norm=1e12, loss=squared_loss)
    trainer.step(x, target)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.summed_grad, expected[name], rtol=1e-9, atol=1e-11)


@given(readers(), st.sampled_from([1e-3, 1e-1, 1e2]))
def test_exact_is_the_sequences_own_gradient_clipped_to_each_layers_limit(model, limit):
    """What goes on to the layers below is unclipped, so plain autograd gives every gradient."""
    model = model.double()
    model.head.requires_grad_(False)
    x, target = torch.randn(3, STEPS, FEATURES).double(), torch.randn(3, 2).double()
    clipping = layerwise(bound="exact", max_input_norm=None)
    trainer = Trainer(copy.deepcopy(model), (STEPS, FEATURES), clipping, max_grad_norm=limit)
    released = trainer.released(x, target)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RNNLinear)}
    expected = {name: torch.zeros_like(released[name]) for name in layers}
    for i in range(len(x)):
        loss = linear_loss(model(x[i : i + 1]), target[i : i + 1], "sum")
        found = iter(
            torch.autograd.grad(loss, [p for m in layers.values() for p in m.parameters()])
        )
        for name, layer in layers.items():
            gradient = torch.cat([next(found).flatten() for _ in layer.parameters()])
            own_limit = trainer.optimizer.layer_sensitivities[name]
            expected[name] += gradient * min(1, own_limit / float(gradient.norm() + 1e-300))
    for name in layers:
        assert torch.allclose(released[name], expected[name], rtol=1e-6, atol=1e-9 * limit)


class Saturated(nn.Module):
    """Every step's input is at its largest, and every step's upstream gradient points one way."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = DPRNN(1, 1, bias=False, nonlinearity="relu", batch_first=True)
        for parameter in self.rnn.parameters():
            nn.init.ones_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


def _worst_case(bound, normalize):
    clipping = layerwise(bound=bound, normalize=normalize, max_input_norm=3.0)
    trainer = Trainer(Saturated(), (STEPS, 1), clipping, max_grad_norm=2.0)
    x = torch.full((1, STEPS, 1), 1e4, dtype=torch.float64)
    return trainer, x, torch.full((1, 1), 1e6, dtype=torch.float64)


@pytest.mark.parametrize(("bound", "normalize"), MODES)
def test_one_sequence_reaches_the_bound_of_every_layer(bound, normalize):
    trainer, x, target = _worst_case(bound, normalize)
    released = trainer.released(x, target)
    limits = trainer.optimizer.layer_sensitivities
    assert 0.999 * limits["rnn.l0.ih"] <= released["rnn.l0.ih"].norm() <= limits["rnn.l0.ih"]
    # The first step's state is zero, which only the product bound does not know.
    share = (STEPS - 1) / STEPS if bound == "product" else 1.0
    reached = released["rnn.l0.hh"].norm() / limits["rnn.l0.hh"]
    assert 0.999 * share <= reached <= 1.0


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_sequence_that_is_not_finite_contributes_nothing(bound, packed):
    torch.manual_seed(0)
    trainer = Trainer(Reader(packed=packed), (STEPS, FEATURES), layerwise(bound=bound))
    x, target = torch.randn(4, STEPS, FEATURES).double(), torch.randn(4, 2).double()
    x[-1, 2, 1] = float("nan")
    check_silent(trainer, x, target)
