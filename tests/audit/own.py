"""Code of a user's own that the command line is told to load."""

import torch
import torch.nn.functional as F
from torch import nn

NUMBER = 3


class Two(nn.Module):
    """Returns its input beside its output."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x):
        return self.layer(x), x


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def tokens():
    return nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 2))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def number():
    return NUMBER


def greedy(size):
    return nn.Linear(size, size)


def batch(n):
    return torch.randn(n, 4), torch.randint(3, (n,))


def nothing(n):
    pass


def loss(output, target):
    return F.cross_entropy(output, target)


def sum_loss(output, target):
    return F.cross_entropy(output, target, reduction="sum")


def broken_loss(output, target):
    raise TypeError("no such\nloss")
