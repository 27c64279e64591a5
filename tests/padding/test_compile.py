"""With one shape, a compiled model is one graph for all Poisson samples, and gives eager sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import BackpropClipping
from tests.helpers import Private, flat, make_private
from tests.padding.test_guarantee import NOT_RECOGNISED
from tests.padding.training import check_alike, private_of, train, with_criterion
from tests.sampling import refused
from tests.test_compile import fresh_compiler  # noqa: F401

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    """Return how many graphs were compiled since the compiler was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def compiled(private: Private, **options: object) -> Private:
    """Compile a model after batches in eager mode have passed all checks."""
    train(private)
    torch._dynamo.utils.counters.clear()
    options = {"backend": "aot_eager", "fullgraph": True} | options
    return private._replace(model=torch.compile(private.model, **options))  # type: ignore[call-overload]


class Loss(nn.Module):
    """A model and its criterion, to be compiled together."""

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, ids: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.model(ids, mask), y)


def test_two_hundred_samples_make_one_graph() -> None:
    private = compiled(private_of("attention", rows=6, noise_multiplier=1.0, lr=0.1))
    before = private.steps
    sizes = set()
    while private.steps < before + 200:
        for batch in private.loader:
            sizes.add(int(batch[0].any(dim=1).sum()))
            train(private, [batch])
    assert len(sizes) > 3
    assert graphs() == 1


@pytest.mark.parametrize(
    ("allocation", "kind"),
    [
        ("joint", "attention"),
        ("joint", "used twice"),
        ("equal", "attention"),
        ("equal", "sequences"),
    ],
)
def test_a_compiled_model_gives_the_eager_sums(allocation: str, kind: str) -> None:
    clipping = BackpropClipping(allocation=allocation)
    fast = compiled(private_of(kind, rows=5, clipping=clipping))
    torch.manual_seed(9)
    found = train(fast)
    slow = private_of(kind, rows=None, clipping=clipping)
    train(slow)
    torch.manual_seed(9)
    check_alike(found, train(slow))
    assert graphs() == 1


@pytest.mark.parametrize(("dynamic", "wrap_model"), [(True, True), (False, False)])
def test_other_ways_to_compile_give_the_eager_sums(dynamic: bool, wrap_model: bool) -> None:
    fast = compiled(private_of(rows=5, wrap_model=wrap_model), dynamic=dynamic)
    torch.manual_seed(9)
    found = train(fast)
    slow = private_of(rows=None)
    train(slow)
    torch.manual_seed(9)
    check_alike(found, train(slow))
    assert graphs() <= 2


@pytest.mark.parametrize("inside", [True, False], ids=["criterion inside", "criterion outside"])
def test_a_criterion_has_the_value_of_the_examples_alone(inside: bool) -> None:
    found = {}
    for rows in (16, None):
        model, optimizer, criterion, loader = with_criterion("attention", rows)
        optimizer.keep_summed_grad = True
        call, loss_of = model, Loss(model, criterion)
        found[rows] = [], []
        for index, batch in enumerate(one for _ in range(2) for one in loader):
            optimizer.zero_grad()
            loss = loss_of(*batch) if inside else criterion(call(*batch[:-1]), batch[-1])
            loss.backward()
            optimizer.step()
            found[rows][0].append(float(loss.detach()))
            found[rows][1].append(flat(p.summed_grad for p in optimizer.params))
            if rows and not index:
                options = {"backend": "aot_eager", "fullgraph": True}
                call, loss_of = (torch.compile(one, **options) for one in (model, loss_of))
    assert found[16][0] == pytest.approx(found[None][0])
    check_alike(found[16][1], found[None][1])


@pytest.mark.parametrize("allocation", ["joint", "equal"])
def test_padding_that_is_not_recognised_is_refused(allocation: str) -> None:
    clipping = BackpropClipping(allocation=allocation)
    private = private_of("used twice", rows=16, clipping=clipping, noise_multiplier=1.0)
    fast = compiled(private)
    batches = iter(fast.loader)
    train(fast, [next(batches)])
    x, y = next(batches)
    items = int(x.any(dim=1).sum())
    refused(fast, (x - 0.5) / 2, y, NOT_RECOGNISED.format(rows=16, items=items))
    train(fast, batches)


class OfTwo(nn.Module):
    """Adds up what it makes of two arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.one(x) + self.other(z)


def test_an_example_with_zeros_in_one_argument_alone_is_no_padding() -> None:
    torch.manual_seed(1)
    x, z = torch.randn(24, 4), torch.randn(24, 4)
    x[::3], z[1::3] = 0, 0
    data = TensorDataset(x, z, torch.randint(0, 3, (24,)))
    found = {}
    for rows in (9, None):
        private = make_private(
            OfTwo(),
            backprop=BackpropClipping(),
            data=data,
            counted=True,
            lr=0.0,
            max_grad_norm=0.5,
            physical_batch_size=rows,
        )
        if rows:
            call = torch.compile(private.model, backend="aot_eager", fullgraph=True)
            private = private._replace(model=call)
        torch.manual_seed(7)
        found[rows] = train(private)
    check_alike(found[9], found[None])
