"""Tiny models on two ranks, made private, and steps on batches that the tests hand out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_bpclip import BackpropClipOptimizer, BackpropClipping, PrivacyEngine
from opacus_bpclip.sampling.records import Pass

WORDS, WIDTH, LENGTH, CLASSES = 7, 6, 5, 3
EXPECTED = 10
WRAPPERS = ("DPDDP", "DDP", "FSDP2")


class Net(nn.Module):
    """Every kind of layer that there is: closed forms, an own graph, functions on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(1, LENGTH, WIDTH))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Linear(9, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places.tanh()
        h = self.norm(self.conv(h.transpose(1, 2)).transpose(1, 2))
        return self.head((h + self.body(h)).mean(dim=1))


class Mean(nn.Module):
    """The mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class Private(NamedTuple):
    engine: PrivacyEngine
    model: nn.Module
    optimizer: BackpropClipOptimizer
    loader: DataLoader

    def step(self, x: Tensor, y: Tensor, *, parts: int = 1, scale: float = 1.0) -> None:
        """Step on this rank's examples, in some physical batches."""
        self.loader.samples.draw(len(x), Pass())
        pieces = list(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True))
        for index, (own, labels) in enumerate(pieces):
            self.optimizer.zero_grad()
            self.optimizer.signal_skip_step(do_skip=index + 1 < len(pieces))
            self.backward(own, labels, scale=scale)
            self.optimizer.step()

    def backward(self, x: Tensor, y: Tensor, *, scale: float = 1.0) -> None:
        loss = nn.functional.cross_entropy(self.model(x), y, reduction="sum")
        (scale * loss / max(len(x), 1)).backward()

    def values(self) -> Tensor:
        return flat(self.optimizer.params)

    def released(self) -> Tensor:
        """Return the last step's sum over all ranks, with its noise."""
        divisor = self.optimizer.expected_batch_size * self.optimizer._guard.ranks.size
        return flat(p.grad for p in self.optimizer.params) * divisor


def flat(tensors: Any) -> Tensor:
    return torch.cat([_whole(x.detach()).flatten() for x in tensors])


def _whole(tensor: Tensor) -> Tensor:
    """Put a tensor that is split along its first axis together, with collectives of our own."""
    if not isinstance(tensor, DTensor):
        return tensor
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.to_local())
    return torch.cat(parts)


def examples(count: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(WORDS, (count, LENGTH), generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


def share(whole: tuple[Tensor, Tensor], rank: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return a rank's own examples."""
    x, y = (tensor.split(list(sizes))[rank] for tensor in whole)
    return x, y


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "DPDDP":
        return DifferentiallyPrivateDistributedDataParallel(model)
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    if wrapper == "FSDP2":
        if isinstance(model, Net):
            for part in (model.words, model.body):
                fully_shard(part)
        return fully_shard(model)
    return model


def make_private(
    wrapper: str = "",
    *,
    model: nn.Module | None = None,
    data: Dataset[Any] | None = None,
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    lr: float = 0.0,
    batch_size: int = EXPECTED,
    generator: torch.Generator | None = None,
    noise_generator: torch.Generator | None = None,
    loss_reduction: str = "mean",
    **options: Any,
) -> Private:
    """Make a model private; ``options`` are those of `BackpropClipping`."""
    if model is None:
        torch.manual_seed(1)
        model = Net()
    model = wrapped(model, wrapper)
    data = data or TensorDataset(*examples(40, seed=6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        data_loader=DataLoader(data, batch_size=batch_size, generator=generator),
        noise_multiplier=noise_multiplier,
        max_grad_norm=max_grad_norm,
        noise_generator=noise_generator,
        loss_reduction=loss_reduction,
        clipping="backprop",
        backprop=BackpropClipping(**options),
    )
    return Private(engine, private, optimizer, loader)
