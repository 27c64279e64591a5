"""Compiled models with recurrent networks: the layers around them are compiled, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from opacus.layers import DPGRU
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import TensorDataset

from opacus_bpclip import BackpropClipping
from tests.helpers import CLASSES, Private, hand_over, make_private, summed

IDS = torch.randint(7, (32, 3), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(CLASSES, (32,), generator=torch.Generator().manual_seed(1))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.rnn = nn.Embedding(7, 4), DPGRU(4, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        y, _ = self.rnn(torch.tanh(self.words(ids)))
        return self.head(y[:, -1])


def _private(allocation: str, **options: bool) -> Private:
    clipping = BackpropClipping(allocation=allocation)
    data = TensorDataset(IDS, LABELS)
    return make_private(Reader(), backprop=clipping, data=data, lr=0.0, **options)


def _step(private: Private, model: nn.Module, size: int) -> Tensor:
    private.optimizer.zero_grad()
    hand_over(private, size)
    F.cross_entropy(30 * model(IDS[:size]), LABELS[:size]).backward()
    private.optimizer.step()
    return summed(private)


@pytest.mark.parametrize("wrap_model", [True, False])
def test_the_layers_around_a_recurrent_network_are_compiled(wrap_model):
    private, eager = (_private("equal", wrap_model=wrap_model) for _ in range(2))
    model = torch.compile(private.model, backend="aot_eager")
    for size in (5, 5):
        found, expected = _step(private, model, size), _step(eager, eager.model, size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] >= 2


def test_a_recurrent_network_under_the_joint_budget_is_refused_with_the_cause():
    private = _private("joint")
    model = torch.compile(private.model, backend="aot_eager")
    with pytest.raises(
        RuntimeError,
        match=r"rnn\.l0\.ih belongs to a recurrent network, a loop over time steps, which runs in "
        r"eager mode under torch\.compile.*Train without torch\.compile, or with "
        r'BackpropClipping\(allocation="equal"\), which compiles the layers around the network',
    ):
        _step(private, model, 5)
    # The first remedy; the second is the test above.
    _step(private, private.model, 5)
    assert private.steps == 1


def test_one_graph_of_a_recurrent_network_is_refused_with_the_cause():
    private = _private("equal")
    model = torch.compile(private.model, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        torch._dynamo.exc.Unsupported,
        match=r"a private recurrent network is a loop over time steps, which runs in eager mode: "
        r'without fullgraph=True, BackpropClipping\(allocation="equal"\) compiles the layers',
    ):
        _step(private, model, 5)
