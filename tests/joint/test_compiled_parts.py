"""Graphs that break and parts that are compiled by themselves are refused by name."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from tests.helpers import Private
from tests.joint.compiled import (
    CLASSES,
    WIDTH,
    Model,
    batch_of,
    clipping,
    private_of,
    step_of,
    summed_of,
)
from tests.joint.helpers import joint

pytestmark = pytest.mark.usefixtures("fresh_compiler")


NEEDS_ONE_GRAPH = 'allocation="joint" measures all layers before it clips any'


def _released_or_refused(private: Private, call: Callable[[Tensor], Tensor]) -> str:
    """Take a step on one example; return the refusal, if any."""
    private.optimizer.zero_grad()
    x, y = batch_of(1)
    try:
        F.cross_entropy(1e4 * call(x), y).backward()
        private.optimizer.step()
    except (PrivacyViolationError, RuntimeError) as error:
        private.optimizer.zero_grad()
        return str(error)
    # Not an AttributeError, an assertion or another accident.
    assert summed_of(private).norm() <= private.optimizer.max_grad_norm
    return ""


@pytest.mark.parametrize(("wrap_model", "poisson_sampling"), [(True, True), (False, False)])
def test_a_graph_break_is_refused_by_name(wrap_model, poisson_sampling):
    private = private_of(
        Model("broken"), joint(), wrap_model=wrap_model, poisson_sampling=poisson_sampling
    )
    call = torch.compile(private.model, backend="aot_eager")
    for _ in range(2):
        assert NEEDS_ONE_GRAPH in _released_or_refused(private, call)
    # Without the compiler training goes on.
    assert _released_or_refused(private, private.model) == ""


def test_a_graph_break_is_no_harm_where_each_layer_has_a_budget():
    own = clipping("dimension")
    private, eager = private_of(Model("broken"), own), private_of(Model("broken"), own)
    call = torch.compile(private.model, backend="aot_eager")
    for size in (5, 5):
        found = step_of(private, size, call)
        torch.testing.assert_close(found, step_of(eager, size), rtol=1e-4, atol=1e-6)


class Blocks(nn.Module):
    """Two blocks that can be compiled by themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[:, :CLASSES]


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("poisson_sampling", [True, False])
def test_blocks_compiled_by_themselves_are_refused_by_name(which, poisson_sampling):
    private = private_of(Blocks(), joint(), poisson_sampling=poisson_sampling, max_grad_norm=1e-3)
    for index in which:
        private.handle._module.blocks[index].compile(backend="aot_eager")
    for _ in range(2):
        assert NEEDS_ONE_GRAPH in _released_or_refused(private, private.model)


class PartlyEager(Model):
    """A layer that the compiler leaves alone, before the others or after them."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    @torch.compiler.disable
    def eager(self, x: Tensor) -> Tensor:
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.eager(x) if self.when == "before" else x)
        y = self.norm(y)
        return self.head(self.eager(y) if self.when == "between" else y)


@pytest.mark.parametrize(("when", "wrap_model"), [("before", False), ("between", True)])
def test_a_layer_left_to_eager_mode_is_refused(when, wrap_model):
    private = private_of(PartlyEager(when), joint(), wrap_model=wrap_model)
    call = torch.compile(private.model, backend="aot_eager")
    for _ in range(2):
        assert _released_or_refused(private, call)


@pytest.mark.parametrize("allocation", ["joint", "dimension"])
def test_two_compiled_forward_passes_in_one_loss_are_refused(allocation):
    private = private_of(Model("plain"), clipping(allocation))
    call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    x, y = batch_of(1)
    assert "two forward passes" in _released_or_refused(private, lambda x: call(x) + call(2 * x))
    step_of(private, 5, call)
    # So are two of a copy.
    handle = copy.deepcopy(private.handle)
    other = torch.compile(handle, backend="aot_eager", fullgraph=True)
    F.cross_entropy(private.model(x), y)
    with pytest.raises(PrivacyViolationError, match="two forward passes"):
        (other(x) + other(2 * x)).sum().backward()
