"""Dropout between the layers of recurrent networks that read packed sequences."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import TensorDataset

from opacus_bpclip import PrivacyEngine
from opacus_bpclip.replacements import compatible_copy, recurrent
from tests.helpers import make_private
from tests.replacements.test_recurrent import INPUT, KINDS, network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_dropout_of_a_packed_sequence_does_not_depend_on_the_others_lengths(kind, enforce_sorted):
    torch.manual_seed(0)
    made = compatible_copy(network(kind, num_layers=3, dropout=0.5, batch_first=True)).train()
    x = torch.randn(4, 6, INPUT, dtype=torch.float64)

    def outputs(lengths, seed=0):
        torch.manual_seed(seed)
        packed = pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted
        )
        return pad_packed_sequence(made(packed)[0], batch_first=True)[0], torch.rand(1)

    (y, after), (z, other) = outputs([6, 4, 3, 3]), outputs([5, 5, 4, 3])
    torch.testing.assert_close(y[3, :3], z[3, :3])
    assert after == other  # So are the model's later random numbers.
    assert not torch.equal(y, outputs([6, 4, 3, 3], seed=1)[0])


def test_dropout_of_packed_sequences_keeps_as_many_numbers_as_pytorchs():
    drop = recurrent.LSTM(4, 4, num_layers=2, dropout=0.8)._drop_of_packed(50, None)
    steps = drop(1, [torch.ones(50, 100), torch.ones(20, 100)])
    again = drop(2, [torch.ones(50, 100)])
    for step in (*steps, *again):
        assert step.unique().tolist() == [0.0, pytest.approx(5.0)]
        assert float(step.mean()) == pytest.approx(1.0, abs=0.15)
    assert not torch.equal(steps[0][:20], steps[1])
    assert not torch.equal(steps[0], again[0])
    every = recurrent.LSTM(4, 4, num_layers=2, dropout=1.0)._drop_of_packed(2, None)
    assert not every(1, [torch.ones(2, 4)])[0].any()


class Reading(nn.Module):
    """Reads packed texts of two-layer embeddings, as many text classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.network = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        return self.head(F.dropout(self.network(x)[1][0][-1], 0.2))


def test_packed_sequences_with_dropout_between_layers_train():
    torch.manual_seed(0)
    model = PrivacyEngine.get_compatible_module(Reading(), clipping="backprop")
    lengths, y = torch.randint(1, 9, (32,)), torch.randint(4, (32,))
    data = TensorDataset(torch.randint(30, (32, 9)), lengths, y)
    _, model, optimizer, loader, _ = make_private(model, data=data, counted=True)
    head = model.head.weight.detach().clone()
    for ids, lengths, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(ids, lengths), y).backward()
        optimizer.step()
    assert not torch.equal(head, model.head.weight)
