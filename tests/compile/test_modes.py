"""How many graphs each mode of torch.compile makes, and that their sums are the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from opacus_bpclip import BackpropClipping
from tests.helpers import Private, mlp
from tests.joint.compiled import Model, batch_of, private_of, summed_of

ALLOCATIONS = pytest.mark.parametrize("allocation", ["joint", "equal"])

Loss = Callable[[Tensor, Tensor], Tensor]


def _loss(model: Callable[[Tensor], Tensor]) -> Loss:
    return lambda x, y: F.cross_entropy(30 * model(x), y)


def _pair(allocation: str, make: Callable[[], nn.Module] = mlp) -> tuple[Private, Private]:
    clipping = BackpropClipping(allocation=allocation)
    return private_of(make(), clipping), private_of(make(), clipping)


def _step(private: Private, loss: Loss, size: int) -> Tensor:
    private.optimizer.zero_grad()
    loss(*batch_of(size)).backward()
    private.optimizer.step()
    return summed_of(private)


def _check_graphs(private: Private, eager: Private, loss: Loss, sizes: dict[int, int]) -> None:
    """Compare steps on batches of some sizes; after each there are as many graphs."""
    for size, graphs in sizes.items():
        found, expected = _step(private, loss, size), _step(eager, _loss(eager.model), size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == graphs, f"for batches of {size}"
    assert not counters["graph_break"]


@ALLOCATIONS
def test_one_dynamic_graph_serves_all_batch_sizes(allocation):
    private, eager = _pair(allocation)
    model = torch.compile(private.model, backend="aot_eager", fullgraph=True, dynamic=True)
    # A graph of its own for no example and for one, as torch has it.
    few = {1: 2, 0: 3} if allocation == "joint" else {}
    _check_graphs(private, eager, _loss(model), {5: 1, 6: 1, 3: 1} | few)


def test_two_graphs_serve_all_batch_sizes_by_default():
    private, eager = _pair("equal")
    model = torch.compile(private.model, backend="aot_eager")
    # The second size shows that the first is no constant.
    _check_graphs(private, eager, _loss(model), {5: 1, 6: 2, 3: 2})


# Torch's own rule, whatever the budget.
@pytest.mark.slow
def test_two_graphs_serve_all_batch_sizes_of_a_joint_budget_by_default():
    private, eager = _pair("joint")
    model = torch.compile(private.model, backend="aot_eager")
    _check_graphs(private, eager, _loss(model), {5: 1, 6: 2, 3: 2})


@pytest.mark.parametrize("body", ["twice", "words"])
def test_one_graph_serves_all_batch_sizes_of_other_uses(body):
    private, eager = _pair("joint", lambda: Model(body))
    model = torch.compile(private.model, backend="aot_eager", fullgraph=True, dynamic=True)
    _check_graphs(private, eager, _loss(model), {5: 1, 6: 1})


@ALLOCATIONS
def test_model_and_loss_are_one_graph(allocation):
    private, eager = _pair(allocation)
    options: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True, "dynamic": True}
    _check_graphs(private, eager, torch.compile(_loss(private.model), **options), {5: 1, 6: 1})


# The compiler of processors' and accelerators' code takes seconds a graph.
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@ALLOCATIONS
def test_the_default_backend_makes_one_graph(allocation, mode):
    private, eager = _pair(allocation)
    model = torch.compile(private.model, mode=mode, fullgraph=True, dynamic=mode == "default")
    _check_graphs(private, eager, _loss(model), {5: 1} | ({6: 1} if mode == "default" else {}))


def test_the_mode_with_least_overhead_makes_one_graph():
    private, eager = _pair("joint")
    model = torch.compile(private.model, mode="reduce-overhead", fullgraph=True)
    _check_graphs(private, eager, _loss(model), {5: 1})
