"""Models as their libraries build them: they train, and one example moves the sum within its limit.

All of them with both budgets: ``pytest -m slow tests/families``. A few run always.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from opacus_bpclip import BackpropClipping, PrivacyEngine
from tests.families import adapters, diffusion, pictures, text
from tests.families.family import FAMILIES, Family

assert FAMILIES, (adapters, diffusion, pictures, text)

# One of each kind: plain, root mean square norms, relative positions and two inputs, pictures with
# tokens, windows, adapters.
pytestmark = pytest.mark.filterwarnings("ignore")  # The libraries' own.

ALWAYS = ("bert-class", "llama-causal", "t5", "vit", "swin", "bert-lora", "llama-prefix-projected")


class _Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


class _Private:
    """A family's model behind the real engine, without noise."""

    def __init__(self, family: Family, allocation: str, limit: float, lr: float) -> None:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The libraries' own.
            model = PrivacyEngine.get_compatible_module(family.build(), clipping="backprop")
        _without_dropout(model)
        self.family, self.trained = family, [p for p in model.parameters() if p.requires_grad]
        self.model, self.optimizer, _ = PrivacyEngine(accountant="rdp").make_private(
            module=model.train(),
            optimizer=torch.optim.SGD(self.trained, lr=lr),
            data_loader=DataLoader(_Rows(family.data(16)), batch_size=8),
            noise_multiplier=0.0,
            max_grad_norm=limit,
            poisson_sampling=False,
            clipping="backprop",
            backprop=BackpropClipping(allocation=allocation),
        )
        self.optimizer.keep_summed_grad = True
        self.optimizer._guard.passes.samples.attached = False

    def summed(self, batch: dict[str, Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        (20 * self.family.losses(self.model, batch).mean()).backward()
        self.optimizer.step()
        return torch.cat([p.summed_grad.detach().double().flatten() for p in self.trained])


def _without_dropout(model: nn.Module) -> None:
    """Turn off what draws numbers: two runs are compared."""
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _check(family: Family, allocation: str) -> None:
    for limit in (1.0, 30.0):
        private = _Private(family, allocation, limit, lr=0.0)
        batch = family.data(4)
        whole = private.summed(batch)
        for left_out in (0, 3):
            kept = [row for row in range(4) if row != left_out]
            rest = private.summed({name: values[kept] for name, values in batch.items()})
            assert (whole - rest).norm() <= limit * 1.0001
    private = _Private(family, allocation, 1.0, lr=0.1)
    before = [p.detach().clone() for p in private.trained]
    private.summed(family.data(8))
    moved = [not torch.equal(a, b) for a, b in zip(before, private.trained, strict=True)]
    assert sum(moved) > len(moved) / 2
    assert all(p.isfinite().all() for p in private.trained)


@pytest.mark.parametrize("name", ALWAYS)
def test_one_of_each_kind_trains_within_its_sensitivity(name):
    _check(FAMILIES[name], "joint")


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["joint", "dimension"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_trains_within_its_sensitivity(name, allocation):
    _check(FAMILIES[name], allocation)
