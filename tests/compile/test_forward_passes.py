"""A step is of one forward pass, and of no more rows than were drawn: in graphs, too."""

import itertools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from opacus_bpclip import PrivacyViolationError
from opacus_bpclip.guard.passes import TWO_FORWARDS
from opacus_bpclip.rules import RULES, BroadcastRule
from tests.budgets import layerwise
from tests.helpers import FEATURES, Private, loss_of, make_private, summed
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


# Of the pairs, those that are noticed in different places.
EVERYDAY = [
    ("eager", "compiled"),
    ("compiled", "compiled"),
    ("compiled", "partly"),
    ("partly",) * 2,
]


@pytest.mark.parametrize(
    "ways",
    [
        ways if ways in EVERYDAY else pytest.param(ways, marks=pytest.mark.slow)
        for ways in itertools.product(WAYS, repeat=2)
    ],
    ids=" and ".join,
)
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
    assert str(refusal.value).startswith("body is used more than 2 times in a forward pass")


@pytest.mark.parametrize("flag", [False, True])
def test_an_eager_and_a_compiled_use_in_one_forward_pass_add_up(flag):
    """By a flag that is set later, or by the number of rows: made-up batches show neither."""

    class Both(Partly):
        flag = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.graphs[0](x)
            both = self.flag if flag else len(x) > 5
            return y + self.body(x) if both else y

    private = counted(Both(), backprop=layerwise())
    x, y = first(private)
    private.handle._module.flag = True
    x, y = x[:1].expand(8, -1), y[:1].expand(8)
    with pytest.raises(PrivacyViolationError, match=r"^body is used more than once"):
        loss_of(private.model, x, y).backward()


# A joint budget refuses a model that is compiled in part.
@pytest.mark.parametrize(
    ("clipping", "way"),
    [(joint(), "eager"), (joint(), "compiled"), *((layerwise(), way) for way in WAYS)],
    ids=lambda value: getattr(value, "allocation", value),
)
# By default torch itself refuses most of them, and says to turn this off.
@functorch_config.patch("donated_buffer", False)
def test_two_backward_passes_over_one_forward_pass_are_refused_without_sampling(way, clipping):
    private = make_private(Partly(), backprop=clipping, poisson_sampling=False)
    call = _calls(private)[way]
    for x, y in itertools.islice(private.loader, 2):  # two batches may add up
        loss_of(call, x, y).backward()
    private.optimizer.step()
    private.optimizer.zero_grad()
    loss = loss_of(call, *next(iter(private.loader)))
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyViolationError, match="twice"):
        loss.backward()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


class ScaleRule(BroadcastRule):
    parameters = ("scale",)
    dims: ClassVar = {"scale": 3}


class Folded(nn.Module):
    """Gives a layer with copied parameters two rows for each example, in large batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.head = Scale(), nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = 2 if len(x) > 4 else 1  # made-up batches have four
        y = self.scale(x.reshape(rows * len(x), -1, 2))
        return self.head(y.reshape(len(x), -1))


@pytest.mark.parametrize("clipping", [joint(), layerwise()], ids=["joint", "layerwise"])
def test_copied_parameters_need_one_row_for_each_example_in_graphs_too(monkeypatch, clipping):
    monkeypatch.setitem(RULES, Scale, ScaleRule)
    private = make_private(Folded(), backprop=clipping)
    call = torch.compile(private.model, backend="aot_eager")
    x, y = torch.randn(7, FEATURES), torch.zeros(7, dtype=torch.long)
    loss_of(call, x[:4], y[:4]).backward()
    private.optimizer.zero_grad()
    with pytest.raises(Exception, match="in a batch of 7 examples"):
        loss_of(call, x, y).backward()
