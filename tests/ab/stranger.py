"""The code of somebody who has never seen this project: models, data, losses, metrics, mistakes."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset, TensorDataset

OWN = "tests.ab.stranger:"
SHORT = {"seeds": [0], "epochs": 1, "batch_size": 16, "delta": 1e-2}


def notes(table):
    return {row.arm: row.note for row in table.rows if row.note}


def _drawn(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))


class Net(nn.Sequential):
    """A CNN on pictures of 8 by 8."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


class BatchNormed(Net):
    """The same with a layer that mixes examples."""

    def __init__(self):
        super().__init__()
        self.insert(1, nn.BatchNorm2d(4))


def pictures():
    train, test = _drawn(64, 1, 8, 8), _drawn(24, 1, 8, 8)
    return tuple(TensorDataset(x, (x.mean(dim=(1, 2, 3)) > 0).long()) for x in (train, test))


class Encoder(nn.Module):
    """A transformer that is called by keyword, and returns a dictionary, as Hugging Face's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        seen = attention_mask.bool()[:, None, :]
        attended = F.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x), attn_mask=seen
        )
        return {"logits": self.head(self.norm(x + attended)[:, 0])}


class Texts(torch.utils.data.Dataset):
    def __init__(self, count):
        self.ids = (_drawn(count, 6).abs() * 5).long().clamp(max=15)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def texts():
    return Texts(64), Texts(24)


class Scaled(nn.Module):
    """A model with a parameter and a buffer of its own, which Opacus's modes do not train."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head((x - self.shift) * self.scale)


def numbers():
    train, test = _drawn(64, 4), _drawn(24, 4)
    return tuple(TensorDataset(x, x.sum(dim=1, keepdim=True)) for x in (train, test))


def regression():
    return nn.Linear(4, 1)


def absolute(outputs, targets):
    return (outputs - targets).abs()


def rmse(outputs, targets):
    return ((outputs - targets) ** 2).mean() ** 0.5


class Counted:
    """A metric as torchmetrics has them."""

    higher_is_better = True

    def __init__(self):
        self.count = 0

    def update(self, outputs, targets):
        self.count += len(targets)

    def compute(self):
        return torch.tensor(self.count)


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr)


def halved(optimizer, steps):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=max(1, steps // 2), gamma=0.5)


# Mistakes.


def needs(width):
    return nn.Linear(width, 1)


def reduced(outputs, targets):
    return (outputs - targets).abs().mean()


def raising(outputs, targets):
    raise KeyError("no such score")


def one_set():
    return (numbers()[0],)


class Stream(IterableDataset):
    def __len__(self):
        return 64

    def __iter__(self):
        return iter(numbers()[0])


def streams():
    return Stream(), Stream()


def unlabelled():
    return [{"x": torch.zeros(4)}] * 64, [{"x": torch.zeros(4)}] * 24
