"""How many passes the search for state needs, and what it sees of a model's state."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from opacus_bpclip.probe import state
from opacus_bpclip.probe.copies import Copy
from opacus_bpclip.probe.snapshots import Snapshot, alike, snapshot
from tests.helpers import CLASSES, FEATURES
from tests.probing import found, made_up
from tests.stateful import AttributeWithGradients, Counter


class Named(NamedTuple):
    one: Tensor
    other: list[int]


class Holding(nn.Module):
    """Holds something that no pass changes."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(FEATURES, CLASSES), held

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Stored(Holding):
    """Stores what it computes, as attention layers do, in an attribute and in a container."""

    def __init__(self) -> None:
        super().__init__({})

    def forward(self, x: Tensor) -> Tensor:
        self.last = y = self.layer(x)
        self.held["maps"] = (y.softmax(dim=1), [y.detach().numpy()])
        return y


@pytest.mark.parametrize(
    ("make", "runs"),
    [
        pytest.param(lambda: nn.Linear(FEATURES, CLASSES), 2, id="nothing"),
        pytest.param(lambda: Holding((torch.ones(2), Named(torch.ones(3), [1]))), 2, id="tuples"),
        pytest.param(Stored, 5, id="overwritten"),
        pytest.param(lambda: nn.Sequential(Stored(), nn.Dropout()), 7, id="overwritten and random"),
        pytest.param(Counter, 1 + 2 * state.PASSES * 4, id="counted"),
    ],
)
def test_only_models_that_change_something_are_run_many_times(
    make: Callable[[], nn.Module], runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    run = Copy.run

    def counted(self: Copy, *args: Any, **options: Any) -> Any:
        made.append(options.get("plain", False))
        return run(self, *args, **options)

    monkeypatch.setattr(Copy, "run", counted)
    assert found(make(), made_up(torch.zeros(2, FEATURES))) is None
    assert sum(made) == runs


@pytest.mark.parametrize(
    "keep",
    [
        pytest.param(lambda self, mean: setattr(self, "last", (mean,)), id="in a tuple"),
        pytest.param(lambda self, mean: setattr(self, "last", {"mean": mean}), id="in a table"),
        pytest.param(lambda self, mean: setattr(self, "last", [mean.tolist()]), id="as numbers"),
        pytest.param(lambda self, mean: setattr(self, "last", mean.numpy()), id="as an array"),
        pytest.param(
            lambda self, mean: setattr(self, "last", SimpleNamespace(mean=mean)), id="in an object"
        ),
    ],
)
def test_snapshots_show_what_a_pass_leaves(keep: Any) -> None:
    model = AttributeWithGradients(lambda *_: None)

    def taken(mean: Tensor) -> Snapshot:
        keep(model, mean)
        return snapshot(model)

    assert alike(taken(torch.ones(2)), taken(torch.ones(2)))
    assert not alike(taken(torch.ones(2)), taken(torch.ones(2) + 1e-6))
