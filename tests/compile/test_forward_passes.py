"""A step is of one forward pass, and of no more rows than were drawn: in graphs, too."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.guard.passes import TWO_FORWARDS
from tests.budgets import layerwise
from tests.helpers import FEATURES, Private, loss_of, summed
from tests.joint.helpers import joint
from tests.sampling import NOTHING_DRAWN, TOO_MANY, counted, first, refused, train

WAYS = ["eager", "compiled", "partly"]
TWO_USES = layerwise(uses={"body": 2})
CLIPPINGS = pytest.mark.parametrize("clipping", [joint(), TWO_USES], ids=["joint", "two uses"])


class Partly(nn.Module):
    """Runs its only layer in a graph of its own, if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Linear(FEATURES, 3)
        self.graphs = [torch.compile(self.body, backend="aot_eager")]

    def forward(self, x: Tensor, partly: bool = False) -> Tensor:
        if not partly:
            return self.body(x)
        # Made-up examples are never so large.
        times = 3 if x.abs().max() > 1e6 else 1
        return sum(self.graphs[0](x) for _ in range(times))


def _calls(private: Private) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "eager": private.model,
        "compiled": torch.compile(private.model, backend="aot_eager"),
        "partly": lambda x: private.model(x, partly=True),
    }


@pytest.mark.parametrize("ways", [*itertools.product(WAYS, repeat=2)])
def test_two_forward_passes_are_refused_however_they_run(ways):
    private = counted(Partly(), backprop=TWO_USES)
    x, y = first(private)
    one, other = (_calls(private)[way] for way in ways)
    with pytest.raises(PrivacyViolationError) as refusal:
        (loss_of(one, x[:1], y[:1]) + loss_of(other, x[1:], y[1:])).backward()
    assert str(refusal.value) == TWO_FORWARDS
    private.optimizer.zero_grad()
    loss_of(one, x, y).backward()
    private.optimizer.step()
    assert private.steps == 1


@CLIPPINGS
@pytest.mark.parametrize("wrap_model", [True, False])
def test_rows_of_a_graph_are_held_against_the_sample(clipping, wrap_model):
    private = counted(Partly(), backprop=clipping, wrap_model=wrap_model)
    x, y = first(private)
    fast = private._replace(model=torch.compile(private.model, backend="aot_eager"))
    twice = torch.cat([x, x]), torch.cat([y, y])
    refused(fast, *twice, TOO_MANY.format(rows=2 * len(x), items=len(x)))
    train(fast, x, y)
    refused(fast, x, y, NOTHING_DRAWN.format(rows=len(x)))
    assert private.steps == 1


def test_a_part_that_is_compiled_by_itself_counts_rows_too():
    private = counted(Partly(), backprop=TWO_USES)
    x, y = first(private)
    fast = private._replace(model=_calls(private)["partly"])
    twice = torch.cat([x, x]), torch.cat([y, y])
    refused(fast, *twice, TOO_MANY.format(rows=2 * len(x), items=len(x)))
    train(fast, x, y)
    assert summed(fast).norm() > 0


def test_a_part_that_is_called_by_itself_is_refused():
    private = counted(Partly(), backprop=TWO_USES)
    x, y = first(private)
    with pytest.raises(Exception, match="outside its model's forward pass"):
        loss_of(private.handle._module.graphs[0], x, y).backward()
    with pytest.raises(PrivacyViolationError, match="not covered"):
        private.optimizer.step()


def test_a_graph_that_runs_more_often_than_declared_is_refused():
    private = counted(Partly(), backprop=TWO_USES)
    x, y = first(private)
    call = _calls(private)["partly"]
    train(private._replace(model=call), x, y)
    x, y = first(private)
    with pytest.raises(PrivacyViolationError) as refusal:
        loss_of(call, 1e7 * x, y).backward()
    assert str(refusal.value) == TWO_FORWARDS
