"""What a loss and a metric get of a model's outputs, and batches that have none."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from opacus_bpclip import compare
from opacus_bpclip.ab.criterion import Criterion
from tests.ab.stranger import SHORT, notes

NUMBERS = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))


class Coder(nn.Module):
    """A variational autoencoder: it returns what it has decoded, the codes and their variances."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(2, 4)

    def forward(self, x):
        code, variance = self.encode(x).chunk(2, dim=1)
        return self.decode(code), code, variance


def autoencoding(outputs, x):
    decoded, code, variance = outputs
    prior = (code.square() + variance.exp() - variance - 1).sum(dim=1)
    return (decoded - x).square().sum(dim=1) + prior


def test_a_loss_of_ones_own_gets_all_that_the_model_returns():
    arms = ["non-private", "flat", "ghost", "backprop"]
    table = compare(Coder, (NUMBERS, NUMBERS), loss=autoencoding, arms=arms, **SHORT)
    assert notes(table) == {}
    metrics = {row.arm: row.metric for row in table.rows}
    assert list(metrics) == arms
    assert metrics["ghost"] == pytest.approx(metrics["flat"], rel=1e-4)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), F.cross_entropy])
def test_a_loss_of_torch_gets_the_logits(loss):
    logits, labels = torch.randn(5, 3), torch.arange(5) % 3
    expected = F.cross_entropy(logits, labels)
    for outputs in (logits, {"logits": logits}, SimpleNamespace(logits=logits), (logits, logits)):
        torch.testing.assert_close(Criterion(loss, "--loss")(outputs, labels), expected)


def test_a_metric_gets_the_logits():
    table = compare(
        Coder,
        (NUMBERS, NUMBERS),
        loss=autoencoding,
        metric=lambda outputs, targets: outputs.shape == targets.shape,
        arms=["backprop"],
        **SHORT,
    )
    assert [row.metric for row in table.rows] == [1]


def words():
    return nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 2))


# Opacus's ghost clipping cannot tell the shape of an embedding's gradients of no examples.
@pytest.mark.parametrize(("batch_size", "noted"), [(2, {"ghost"}), (16, set())])
def test_an_arm_that_fails_on_empty_batches_says_so_where_they_are_drawn(batch_size, noted):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(10, (64, 3), generator=generator), torch.arange(64) % 2)
    table = compare(
        words, (data, data), arms=["ghost", "backprop"], **{**SHORT, "batch_size": batch_size}
    )
    assert notes(table).keys() == noted
    if noted:
        said = notes(table)["ghost"]
        assert said.startswith("Poisson sampling draws empty batches at this --batch-size, and the")
        assert "cannot reshape tensor of 0 elements" in said
        assert said.endswith("Raise --batch-size")
        assert "ghost cannot train this model: " in str(table)
