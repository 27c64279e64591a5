"""Whitened gradients: plain autograd's, bounded, tight, and the same however they are computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping, InputWhitening
from tests.checks import Trainer, check_independence, check_sensitivity, joint, linear_loss
from tests.helpers import make_private
from tests.neighbours import REDUCTIONS, neighbours
from tests.reference import whitened
from tests.strategies import clippings, whitenings
from tests.views.viewed import Viewed
from tests.whitening.helpers import ALLOCATIONS, SHAPE, batch, clipping_of, matrices_of, network


@st.composite
def whitened_clippings(draw: st.DrawFn) -> BackpropClipping:
    clipping = draw(clippings().filter(lambda clipping: clipping.bound == "exact"))
    return replace(clipping, whitening=draw(whitenings()))


@settings(max_examples=150)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS))
def test_one_example_moves_the_sum_by_at_most_its_sensitivity(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS, dtype=torch.float32))
def test_the_bound_holds_in_float32_at_every_scale(case: tuple[Trainer, Tensor, Tensor]) -> None:
    check_sensitivity(*case)


@settings(max_examples=80)
@given(neighbours(clipping=whitened_clippings(), reduction=REDUCTIONS))
def test_a_batch_sums_what_its_examples_contribute_alone(
    case: tuple[Trainer, Tensor, Tensor],
) -> None:
    check_independence(*case)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_sum_is_that_of_clipped_whitened_gradients(reduction: str) -> None:
    plain, (x, target) = network(), batch()
    trainer = Trainer(network(), SHAPE, clipping_of(), max_grad_norm=0.7, reduction=reduction)
    for _ in range(2):
        matrices = matrices_of(trainer)
        assert set(matrices) == {"0", "3", "6", "9"}
        found = joint(trainer.released(x, target))
        total = torch.zeros_like(found)
        for i in range(len(x)):
            loss = linear_loss(plain(x[i : i + 1]), target[i : i + 1], "sum")
            own = [*torch.autograd.grad(loss, list(plain.parameters()))]
            for k, (name, _) in enumerate(plain.named_parameters()):
                layer, _, kind = name.partition(".")
                if layer in matrices and kind == "weight":
                    own[k] = whitened(own[k], matrices[layer])
            gradient = torch.cat([g.flatten() for g in own])
            total += gradient * min(1.0, 0.7 / float(gradient.norm()))
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-12)
        trainer.move(x, target, lr=0.5)
        plain.load_state_dict(trainer.plain.state_dict())
        changed = matrices_of(trainer)
        assert not any(torch.equal(matrices[name], changed[name]) for name in matrices)


@ALLOCATIONS
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 3), (6,)),
        (lambda: nn.Linear(6, 3, bias=False), (6,)),
        (lambda: nn.Linear(6, 3), (4, 6)),
        (lambda: nn.Linear(40, 50), (2, 40)),
        (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 7, 7)),
        (lambda: nn.Conv2d(32, 64, 3), (32, 4, 4)),
    ],
)
def test_a_large_example_reaches_the_limit(
    make: Callable[[], nn.Module], shape: tuple[int, ...], allocation: str
) -> None:
    """Through per-example gradients, products and single positions."""
    torch.manual_seed(0)
    model, public = make().double(), torch.randn(8, *shape)
    clipping = BackpropClipping(
        allocation=allocation,  # type: ignore[arg-type]
        whitening=InputWhitening(lambda _: public, power=0.5),
    )
    trainer = Trainer(model, shape, clipping, max_grad_norm=2.0)
    x = torch.randn(1, *shape).double()
    reached = joint(trainer.released(x, 1e4 * torch.ones(1, model(x).numel()).double())).norm()
    assert 0.999 * 2.0 <= reached <= 2.0


class Twice(nn.Module):
    """A layer that is used twice, and two that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(torch.tanh(self.layer(x))))
        return self.other(torch.tanh(self.one(y)))


def test_several_uses_are_whitened_alike_and_shared_weights_are_not() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    plain = copy.deepcopy(model)
    whitening = InputWhitening(lambda _: torch.randn(5, 4), power=0.5)
    trainer = Trainer(model, (4,), BackpropClipping(whitening=whitening), max_grad_norm=0.3)
    matrices = matrices_of(trainer)
    assert set(matrices) == {"layer"}
    x, target = torch.randn(1, 4).double(), torch.ones(1, 4).double()
    found = trainer.released(x, target)
    own = torch.autograd.grad(linear_loss(plain(x), target, "sum"), [*plain.parameters()])
    named = dict(zip((name for name, _ in plain.named_parameters()), own, strict=True))
    named["layer.weight"] = whitened(named["layer.weight"], matrices["layer"])
    gradient = torch.cat([g.flatten() for g in named.values()])
    expected = gradient * min(1.0, 0.3 / float(gradient.norm()))
    torch.testing.assert_close(joint(found), expected, rtol=1e-9, atol=1e-12)


@ALLOCATIONS
def test_views_are_whitened_as_positions(allocation: str) -> None:
    x, target = batch(6)
    found = []
    for views in (1, 3):
        trainer = Viewed(network(), SHAPE, clipping_of(allocation), views=views, max_grad_norm=1e6)
        rows = x.unflatten(0, (-1, views)), target.unflatten(0, (-1, views)).transpose(1, 2)
        # The loss is a sum over the views here, and not a mean.
        found.append(joint(trainer.released(rows[0], rows[1].flatten(1))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@ALLOCATIONS
def test_compiled_sums_follow_the_matrices(allocation: str) -> None:
    torch._dynamo.reset()
    eager, compiled = (Trainer(network(), SHAPE, clipping_of(allocation)) for _ in range(2))
    compiled.model = torch.compile(compiled.model, backend="aot_eager", fullgraph=True)
    x, target = batch()
    before = counters["stats"]["unique_graphs"]
    for _ in range(3):
        one, other = (joint(each.released(x, target)) for each in (eager, compiled))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        eager.move(x, target)
        compiled.move(x, target)
    assert counters["stats"]["unique_graphs"] == before + 1


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=False)


def test_checkpointed_layers_are_whitened_alike() -> None:
    x, target = batch()
    found = [
        joint(Trainer(make(network()), SHAPE, clipping_of()).released(x, target))
        for make in (lambda model: model, Checkpointed)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_a_matrix_is_kept_for_all_parts_of_a_logical_batch() -> None:
    learnt: list[int] = []
    whitening = InputWhitening(lambda step: learnt.append(step) or torch.randn(5, 4), every=1)
    clipping = BackpropClipping(whitening=whitening)
    private = make_private(nn.Linear(4, 3), backprop=clipping, loss_reduction="sum")
    assert learnt == [0]
    steps = 0
    with BatchMemoryManager(
        data_loader=private.loader, max_physical_batch_size=2, optimizer=private.optimizer
    ) as parts:
        for x, y in parts:
            private.optimizer.zero_grad()
            F.cross_entropy(private.model(x), y, reduction="sum").backward()
            private.optimizer.step()
            steps += not private.optimizer._is_last_step_skipped
            assert learnt == [*range(steps + 1)]
    assert steps == len(private.loader)
