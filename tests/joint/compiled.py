"""What tests of compiled models share."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_bpclip import BackpropClipping
from opacus_bpclip.model.plan import Plan
from opacus_bpclip.rules import BroadcastRule
from tests.budgets import layerwise
from tests.helpers import Private, make_private
from tests.joint.helpers import joint

WIDTH, CLASSES = 4, 3


class Scaled(nn.Module):
    """Parameters that are broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)


class ScaledRule(BroadcastRule):
    parameters = ("scale",)
    dims: ClassVar = {"scale": 2}


class Model(nn.Module):
    """A body between a first layer and a head."""

    def __init__(self, body: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = body
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.scaled, self.act = Scaled(), nn.PReLU()
        self.words = nn.Embedding(5, WIDTH)
        if body == "tied":
            self.second.weight = self.first.weight
        for name in ("second", "scaled", "act", "words"):
            used = {"scaled": "broadcast", "act": "slopes", "words": "words"}.get(name, "")
            if name == "second" and body in ("plain", "broken", "tied", "checkpointed", "skipped"):
                continue
            if body != used:
                getattr(self, name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        if self.kind == "broken":
            torch._dynamo.graph_break()
        if self.kind in ("plain", "broken", "tied"):
            y = self.second(y)
        elif self.kind == "twice":
            y = self.first(y)
        elif self.kind == "broadcast":
            y = self.scaled(y)
        elif self.kind == "slopes":
            y = self.act(y)
        elif self.kind == "words":
            y = y + self.words((x.abs() * 3).long() % 5).mean(1)
        elif self.kind == "checkpointed":
            y = checkpoint(lambda z: torch.tanh(self.second(z)), y, use_reentrant=False)
        return self.head(self.norm(y))


def private_of(model: nn.Module, clipping: BackpropClipping, **options: object) -> Private:
    options = {"max_grad_norm": 0.5, "lr": 0.0} | options
    private = make_private(model, backprop=clipping, **options)
    private.handle._prober = Unasked()
    return private


class Unasked:
    """No made-up examples: these models are alike but for what they are called on."""

    def on_batch(self, batch: object) -> Plan:
        return Plan({})


def batch_of(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, WIDTH, generator=generator) * 3
    return x, torch.randint(CLASSES, (size,), generator=generator)


def summed_of(private: Private) -> Tensor:
    return torch.cat([p.summed_grad.flatten() for p in private.parameters]).clone()


def step_of(private: Private, size: int, call: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    private.optimizer.zero_grad()
    x, y = batch_of(size)
    F.cross_entropy(30 * (private.model if call is None else call)(x), y).backward()
    private.optimizer.step()
    return summed_of(private)


def clipping(allocation: str) -> BackpropClipping:
    if allocation == "joint":
        return joint()
    return layerwise(bound="exact", max_input_norm=None, uses={"first": 2})
