"""Uses of layers that are counted by running the model on made-up examples."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyViolationError
from tests.budgets import layerwise
from tests.helpers import CLASSES, FEATURES, batch, loss_of, make_private, summed
from tests.probing import OnlyReal, Recurrent


class Repeated(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.cell = times, nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.cell(x))
        return self.head(x)


@given(st.integers(1, 5))
def test_uses_are_counted_by_a_dry_run(times: int) -> None:
    private = make_private(Repeated(times), backprop=layerwise(uses="auto"))
    assert private.handle._config.uses == {"cell": times, "head": 1}
    loss_of(private.model, *batch()).backward()
    private.optimizer.step()
    assert summed(private).norm() <= 6 * (1 + 1e-6)


def test_more_uses_than_were_counted_are_refused_on_the_batch() -> None:
    model = Repeated(2)
    private = make_private(model, backprop=layerwise(uses="auto"))
    model.times = 3
    with pytest.raises(PrivacyViolationError, match=r"^cell is used more than 2 times"):
        private.model(batch()[0])


def test_where_uses_cannot_be_counted_one_is_allowed() -> None:
    # On examples that cannot be made up. A count on real ones would not be public.
    ids = torch.arange(100, 108)
    data = TensorDataset(ids, ids)
    private = make_private(OnlyReal(False), data=data, backprop=layerwise(uses="auto"))
    assert private.handle._config.uses == "auto"
    assert {layer.uses for layer in private.handle._layers.values()} == {1}


def test_the_steps_of_a_recurrent_network_are_no_uses() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 5, FEATURES), torch.zeros(32, dtype=torch.long))
    private = make_private(
        nn.Sequential(Recurrent(), nn.Flatten(), nn.Linear(30, CLASSES)),
        data=data,
        backprop=layerwise(uses="auto"),
    )
    assert set(private.handle._config.uses.values()) == {1}


class TwoRuns(nn.Module):
    """A recurrent network that runs several times in one forward pass."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs, self.lstm = runs, DPLSTM(FEATURES, FEATURES, num_layers=2, batch_first=True)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.runs):
            x = self.lstm(x)[0]
        return self.head(x[:, -1])


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_the_runs_of_a_recurrent_network_are_uses(runs: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 5, FEATURES)
    private = make_private(
        TwoRuns(runs),
        data=TensorDataset(x, torch.zeros(32, dtype=torch.long)),
        backprop=layerwise(uses="auto"),
    )
    uses = private.handle._config.uses
    assert {count for name, count in uses.items() if name.startswith("lstm.")} == {runs}
    assert uses["head"] == 1
    loss_of(private.model, x[:6], torch.zeros(6, dtype=torch.long)).backward()
    private.optimizer.step()
    assert summed(private).norm() <= 6 * (1 + 1e-6)


class Pair(nn.Module):
    """Takes two inputs, as does a loop over ``(a, b, label)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)

    def forward(self, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(a) - self.layer(b)
        # By luck a label fits: as a mask, it would reach over the batch.
        return y if mask is None else y * mask.double().mean()


def test_a_batch_of_inputs_and_a_label_is_tried_without_the_label() -> None:
    data = TensorDataset(*torch.randn(2, 32, FEATURES), torch.zeros(32, dtype=torch.long))
    private = make_private(Pair(), data=data, backprop=layerwise(uses="auto"))
    assert private.handle._config.uses == {"layer": 2}
    assert private.handle._prober.passed
