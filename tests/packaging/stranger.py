"""A script of somebody who uses the package, fully typed; run and type-checked by the tests."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import (
    BackpropClipping,
    CrossEntropy,
    PrivacyEngine,
    SeveralOptimizers,
    clip_inputs,
    register_rule,
)
from opacus_bpclip.audit import CASES, Verdict, audit
from opacus_bpclip.rules import BroadcastRule


class Scaled(nn.Module):
    """A layer of the script's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = x * self.scale
        return scaled


@register_rule(Scaled)
class ScaledRule(BroadcastRule):
    """Its rule."""

    parameters = ("scale",)
    dims: ClassVar[dict[str, int]] = {"scale": 2}


def train() -> float:
    """Train privately, and return the epsilon that was spent."""
    model = nn.Sequential(Scaled(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    clip_inputs(nn.Sequential(nn.Linear(4, 2)), 3.0)
    data = TensorDataset(torch.randn(64, 4), torch.randint(2, (64,)))
    options = BackpropClipping(allocation={"0": 1.0, "1": 1.0, "3": 2.0}, bound="weighted")
    engine = PrivacyEngine()
    private, optimizer, criterion, loader = engine.make_private(
        module=model,
        optimizer=SeveralOptimizers(
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            torch.optim.Adam(model[1:].parameters(), lr=0.01),
        ),
        criterion=CrossEntropy(),
        data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=options,
    )
    for x, y in loader:
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()
    spent: float = engine.get_epsilon(delta=1e-4)
    return spent


verdict: Verdict = audit(CASES["linear"].target("linear"), trials=0)
print(f"epsilon {train():.2f}, audit: {verdict.outcome}")
