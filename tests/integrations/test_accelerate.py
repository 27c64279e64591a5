"""Loops that accelerate prepares train privately."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_bpclip import PrivacyEngine


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["prepared first", "private first", "model alone"])
def test_a_loop_of_accelerate_trains_in_one_process(order: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    loader = DataLoader(TensorDataset(torch.randn(64, 4), torch.arange(64) % 3), batch_size=16)
    if order == "prepared first":
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if order == "model alone":
        model = accelerator.prepare(model)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
    )
    if order == "private first":
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(x), y))
        optimizer.step()
    assert engine.accountant.history == [(1.0, 0.25, 4)]
    assert not any(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
