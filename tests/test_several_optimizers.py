"""Several optimizers over one model share its steps, its noise and its entries."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from opacus_bpclip import (
    CoverageError,
    PrivacyEngine,
    SeveralOptimizers,
)
from opacus_bpclip.optimizer import fingerprint
from tests.budgets import layerwise
from tests.helpers import dataset, flat, mlp


def muon_beside_adamw(model: nn.Module) -> SeveralOptimizers:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return SeveralOptimizers(torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(others, lr=0.01))


def test_one_entry_a_step_and_every_parameter_moves() -> None:
    model, engine = mlp(), PrivacyEngine()
    inner = muon_beside_adamw(model)
    handle, optimizer, loader = engine.make_private(
        module=model,
        optimizer=inner,
        data_loader=DataLoader(dataset(), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        clipping="backprop",
        backprop=layerwise(bound="exact"),
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(handle(x), y).backward()
            optimizer.step()
        schedule.step()
    assert engine.accountant.history == [(1.0, 1 / 4, 8)]
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.0025]
    assert set(optimizer.state) == set(model.parameters())


def test_two_calls_on_one_model_are_refused_with_the_remedy() -> None:
    model, engine, data = mlp(), PrivacyEngine(), dataset()
    for part in (model[0], model[2]):
        options = {
            "module": model,
            "optimizer": torch.optim.SGD(part.parameters(), lr=0.1),
            "data_loader": DataLoader(data, batch_size=8),
            "noise_multiplier": 1.0,
            "max_grad_norm": 1.0,
            "clipping": "backprop",
            "wrap_model": False,
        }
        if part is model[0]:
            engine.make_private(**options)
            continue
        with pytest.raises(CoverageError) as refusal:
            engine.make_private(**options)
    assert str(refusal.value) == (
        "The model has backpropagation clipping attached already. Call cleanup() on the model "
        "that make_private returned, or pass a fresh one. For several optimizers of one model, "
        "pass opacus_bpclip.SeveralOptimizers(one, other) in one call."
    )


def test_states_are_saved_loaded_and_copied() -> None:
    model = mlp()
    both = muon_beside_adamw(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert both.step(lambda: 3.0) == 3.0
    other = muon_beside_adamw(mlp())
    other.load_state_dict(copy.deepcopy(both.state_dict()))
    assert other.state_dict().keys() == {"optimizers"}
    assert fingerprint.KEY not in other.state_dict()
    model_copy, copied = copy.deepcopy((model, both))
    for p in model_copy.parameters():
        p.grad = torch.ones_like(p)
    before = flat(model.parameters()).clone()
    copied.step()
    assert torch.equal(flat(model.parameters()), before)
    assert not torch.equal(flat(model_copy.parameters()), before)
    copied.zero_grad()
    assert all(p.grad is None for p in model_copy.parameters())
    assert "Parameter Group 1" in repr(copied)


def test_wrong_arguments_are_refused() -> None:
    model = mlp()
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"^Expected two optimizers or more, got 1\.$"):
        SeveralOptimizers(one)
    with pytest.raises(ValueError, match=r"^A parameter is in two of the optimizers"):
        SeveralOptimizers(one, torch.optim.SGD(model[0].parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"^Add the group to one of the optimizers"):
        muon_beside_adamw(model).add_param_group({"params": []})
