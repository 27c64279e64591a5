"""A module of a user's own, where the command line finds it."""

import sys

import pytest

_CODE = """
import torch
import torch.nn.functional as F
from torch import nn
from opacus_bpclip.audit.published import repaired

NUMBER = 3


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def tokens():
    return nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 2))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def two():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x):
            return self.layer(x), x

    return Two()


def number():
    return 3


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
    raise TypeError("no such\\nloss")
"""


@pytest.fixture
def users_code(tmp_path, monkeypatch):
    (tmp_path / "users_code.py").write_text(_CODE)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("users_code", None)
