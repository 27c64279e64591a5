"""Which clipping suits this model? ``python docs/examples/compare_clipping.py``."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from opacus_bpclip import compare


class Net(nn.Module):
    """A small model with a parameter and a buffer of its own, outside of its layers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.scale = nn.Parameter(torch.ones(8))
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        """Return a prediction for each example, ``[B, 1]``."""
        return self.head(torch.tanh(self.hidden((x - self.mean) * self.scale)))


def datasets():
    """Return a training and a test set of (input, target)."""
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    y = x[:, :4].sum(dim=1, keepdim=True) - x[:, 4:].sum(dim=1, keepdim=True)
    return TensorDataset(x[:300], y[:300]), TensorDataset(x[300:], y[300:])


def rmse(outputs, targets):
    """Return the root mean square error over the whole test set."""
    return ((outputs - targets) ** 2).mean().sqrt()


rmse.higher_is_better = False


if __name__ == "__main__":
    table = compare(
        Net,
        datasets,
        loss=nn.MSELoss,
        metric=rmse,
        optimizer="Adam",
        lr=0.02,
        arms=["non-private", "flat", "ghost", "backprop"],
        epsilon=3.0,
        delta=1e-3,
        epochs=2,
        batch_size=50,
        seeds=[0, 1],
    )
    print(table)
    best = min((row for row in table.rows if row.epsilon), key=lambda row: row.metric)
    print(f"best private run: {best.arm}, seed {best.seed}, {table.metric} {best.metric:.3f}")
